"""Configuration: which classes it may name, how it is checked and built, what names the computation that it describes."""

from src.config.errors import ConfigError, RunError, suggest
from src.config.identity import config_hash, experiment_hash
from src.config.schema import check, check_complete, instantiate, to_plain

__all__ = [
    "ConfigError",
    "RunError",
    "check",
    "check_complete",
    "config_hash",
    "experiment_hash",
    "instantiate",
    "suggest",
    "to_plain",
]
