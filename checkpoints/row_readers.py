"""Readers of source tensors that can read some rows alone, so that a huge tensor is never held whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import safetensors


@dataclasses.dataclass(frozen=True)
class SafetensorsReader:
    """One tensor of a safetensors file, as f32. A RowReader (checkpoints/source.py)."""

    file: Path
    name: str

    def __call__(self) -> np.ndarray:
        """The whole tensor."""
        import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which safetensors hands out)

        with safetensors.safe_open(str(self.file), framework="numpy") as tensors:
            return np.asarray(tensors.get_tensor(self.name)).astype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` alone."""
        import ml_dtypes  # noqa: F401

        with safetensors.safe_open(str(self.file), framework="numpy") as tensors:
            return np.asarray(tensors.get_slice(self.name)[start:stop]).astype(np.float32)
