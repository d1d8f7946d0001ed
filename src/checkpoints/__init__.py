"""Checkpoints: plain data, opened in one line."""

from src.checkpoints.files import CheckpointError, load_model, read_checkpoint
from src.checkpoints.official import from_official, to_official

__all__ = ["CheckpointError", "from_official", "load_model", "read_checkpoint", "to_official"]
