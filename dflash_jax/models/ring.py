"""Storage of layers with a window: which pages of a sequence any later row can still see.

A row of such a layer sees the `window - 1` tokens before it, so the pages before those are given back while a
sequence grows. On the device a sequence has a *ring table* of fixed width beside its page table: the page of page
number p stands in column p modulo the width, which covers all that the rows of one visit see and write. On the host a
sequence holds its ring pages by number (`Held`), so no page is overwritten while it is held: rejected rows and padding
destroy nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from dflash_jax.models.config import ModelConfig

Held = Mapping[int, int]
"""Page number in the sequence -> page of the pools of layers with a window."""

ROLLBACK = 64
"""Tokens before a kept place that a sequence can go back to: a next turn may write the last tokens anew."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Sizes in tokens: what a row sees before itself, rows of a prefill chunk, rows of a decoding visit, a page."""

    lookback: int
    chunk: int
    visit: int
    page_size: int

    @property
    def width(self) -> int:
        """Columns of a sequence's ring table."""
        return self._touched(self.lookback + max(self.chunk, self.visit))

    @property
    def most_held(self) -> int:
        """Ring pages that a sequence holds at most: in a chunk, or in a visit that keeps the answer's beginning too."""
        behind = self.lookback + ROLLBACK
        return max(self._touched(behind + self.chunk), self._touched(behind + self.visit) + self._touched(behind))

    def behind(self, index: int, slack: int = 0) -> range:
        """Numbers of the pages with the tokens before token index `index` that a row there sees, and `slack` more."""
        return range(max(0, index - self.lookback - slack) // self.page_size, -(-index // self.page_size))

    def reachable(self, held: Held, length: int) -> int:
        """The last token index, `length` or before it, from which a sequence of `length` tokens can go on."""
        ends = {min(length, (number + 1) * self.page_size) for number in held}
        return max((end for end in ends if all(number in held for number in self.behind(end))), default=0)

    def table(self, held: Held, length: int) -> np.ndarray:
        """i32[1, width] for rows at token index `length` and on; page 0 stands for what they neither see nor own."""
        table = np.zeros((1, self.width), np.int32)
        first = max(0, length - self.lookback) // self.page_size
        for number in range(first, first + self.width):
            table[0, number % self.width] = held.get(number, 0)
        return table

    def whole_table(self) -> np.ndarray:
        """i32[1, width] of pages 1 to `width`, for a sequence that only grows and has pools of its own."""
        return np.arange(1, self.width + 1, dtype=np.int32)[None]

    def _touched(self, tokens: int) -> int:
        """Pages that so many tokens in a row lie in at most."""
        return (tokens + self.page_size - 2) // self.page_size + 1


def ring_of(config: ModelConfig, *, chunk: int, visit: int, page_size: int, pages_per_sequence: int) -> Ring | None:
    """The ring of a model; None if no layer has a window or sequences are too short to gain anything."""
    windows = [layer.window for layer in config.layers if layer.window is not None]
    if not windows:
        return None
    ring = Ring(max(windows) - 1, chunk, visit, page_size)
    return ring if ring.most_held < pages_per_sequence else None
