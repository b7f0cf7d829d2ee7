"""The reader that every source format builds on: f32 rows of one tensor, with a warning for numbers that are none."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np

Rows = Callable[[int, int], np.ndarray]
"""Reads rows `start` to `stop` of one tensor as f32."""


class CheckpointWarning(UserWarning):
    """Something in a checkpoint that a person should know, and that loading goes on after."""


@dataclasses.dataclass(frozen=True)
class CheckedReader:
    """Reads a tensor of `height` rows, all of it or some rows alone. `where` names it in messages."""

    where: str
    height: int
    read: Rows

    def __call__(self) -> np.ndarray:
        """The whole tensor."""
        return self.rows(0, self.height)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`."""
        values = self.read(start, stop)
        # The extremes are NaN if anything is, and need no array of flags.
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            warnings.warn(
                f"{self.where} holds NaN or infinite numbers; answers will be broken: fetch it again",
                CheckpointWarning,
                stacklevel=2,
            )
        return values


def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The matrices of experts `[experts, out, in]` stand below each other in ours."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def flat_rows(read: Rows, shape: tuple[int, ...]) -> Rows:
    """Reads rows of the flat shape, where `read` reads along the first axis of `shape`."""
    if len(shape) != 3:
        return read
    height = shape[1]

    def rows(start: int, stop: int) -> np.ndarray:
        first = start // height
        values = read(first, -(-stop // height))
        return values.reshape(-1, shape[2])[start - first * height : stop - first * height]

    return rows
