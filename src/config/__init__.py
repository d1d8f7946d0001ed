"""Configuration: which classes it may name, how it is checked and built, what names the computation that it describes."""

from src.config.identity import config_hash, experiment_hash
from src.config.schema import check, check_complete, instantiate, to_plain
from src.support.errors import ConfigError, RunError, suggest

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
