"""Reading, converting and storing weights."""

from checkpoints.conversion import Checkpoint, Conversion, convert, describe, load, verify
from checkpoints.default_model import cache_folder, default_drafter, default_model
from checkpoints.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "cache_folder",
    "convert",
    "default_drafter",
    "default_model",
    "describe",
    "load",
    "verify",
]
