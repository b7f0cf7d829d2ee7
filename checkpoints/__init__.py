"""Reading, converting and storing weights."""

from checkpoints.conversion import Checkpoint, convert, describe, load
from checkpoints.default_model import cache_folder, default_model
from checkpoints.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "cache_folder", "convert", "default_model", "describe", "load"]
