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
        """The whole tensor; matrices of experts `[experts, out, in]` below each other."""
        return self._read(slice(None))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of what a call would give."""
        with safetensors.safe_open(str(self.file), framework="numpy") as tensors:
            shape = tensors.get_slice(self.name).get_shape()
        height = shape[1] if len(shape) == 3 else 1  # rows of ours in one of the file's
        first = start // height
        return self._read(slice(first, -(-stop // height)))[start - first * height : stop - first * height]

    def _read(self, part: slice) -> np.ndarray:
        import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which safetensors hands out)

        with safetensors.safe_open(str(self.file), framework="numpy") as tensors:
            values = np.asarray(tensors.get_slice(self.name)[part]).astype(np.float32)
        return values.reshape(-1, values.shape[-1]) if values.ndim == 3 else values
