"""Cases of best_tokens, draft_tree and move_rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import Seed


@dataclasses.dataclass(frozen=True)
class BestTokensCase:
    """Arguments of best_tokens: logits of a few values, so that many are equal."""

    name: str
    rows: int
    vocabulary: int
    count: int = 8
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        generator = np.random.default_rng(seed)
        logits = generator.integers(-1000, 1000, (self.rows, self.vocabulary), dtype=np.int32)
        return (jnp.asarray(logits, self.dtype),), {"count": self.count}

    @property
    def bytes(self) -> int:
        """The logits."""
        return self.rows * self.vocabulary * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """A comparison for each."""
        return self.rows * self.vocabulary


@dataclasses.dataclass(frozen=True)
class DraftTreeCase:
    """Arguments of draft_tree: log-probabilities of candidates, of which the loudest are nearly sure."""

    name: str
    slots: int
    levels: int
    rows: int
    count: int = 8
    loudness: float = 2.0
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        generator = np.random.default_rng(seed)
        anchor = generator.integers(0, 1000, (self.slots,), dtype=np.int32)
        candidates = generator.integers(0, 1000, (self.slots, self.levels, self.count), dtype=np.int32)
        scores = generator.standard_normal((self.slots, self.levels, self.count, self.count), np.float32)
        scores = jax.nn.log_softmax(self.loudness * jnp.asarray(scores), axis=-1)
        return (jnp.asarray(anchor), jnp.asarray(candidates), scores), {"rows": self.rows}

    @property
    def bytes(self) -> int:
        """Scores of the children of every node."""
        return 4 * self.slots * self.rows * self.count

    @property
    def flops(self) -> int:
        """A comparison with each."""
        return self.slots * self.rows * self.count


@dataclasses.dataclass(frozen=True)
class MoveRowsCase:
    """Arguments of move_rows: pools of several `(kv_heads, width)`; `starts` and `pages` as in AttentionRowsCase."""

    name: str
    starts: tuple[int, ...]
    rows: int
    heads: tuple[tuple[int, int], ...]
    page_size: int
    pages: int
    ring: bool = False
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments: the first pool comes by itself.

        A path leaves some rows out, and ends in rows that stay.
        """
        generator = np.random.default_rng(seed)
        slots, tokens = len(self.starts), (1 + len(self.starts) * self.pages) * self.page_size
        pools = [generator.standard_normal((tokens, *heads), np.float32) for heads in self.heads]
        table = 1 + generator.permutation(slots * self.pages).astype(np.int32).reshape(slots, self.pages)
        path = np.tile(np.arange(self.rows, dtype=np.int32), (slots, 1))
        for slot in range(slots):
            taken = [0, *range(1 + slot, self.rows, 2 + slot)]
            path[slot, : len(taken)] = taken
        first, *others = [jnp.asarray(pool, self.dtype) for pool in pools]
        positional = (
            first,
            others,
            jnp.asarray(path),
            jnp.asarray(table),
            jnp.asarray(self.starts, jnp.int32),
        )
        return positional, {"page_size": self.page_size, "ring": self.ring}

    @property
    def bytes(self) -> int:
        """Rows that are read and written, at most all."""
        numbers = sum(heads * width for heads, width in self.heads)
        return 2 * len(self.starts) * self.rows * numbers * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """None."""
        return 0


SMALL_BEST_TOKENS = (
    BestTokensCase("one chunk", 3, 100),
    BestTokensCase("three chunks, the last one not whole", 2, 9001),
    BestTokensCase("bf16", 2, 5000, dtype="bfloat16"),
    BestTokensCase("as many as there are", 2, 8),
)
LARGE_BEST_TOKENS = (
    BestTokensCase("SmolLM2 block", 15, 49_152),
    BestTokensCase("Gemma 4 block", 15, 262_144),
)
SMALL_DRAFT_TREE = (
    DraftTreeCase("16 rows", 3, 15, 16),
    DraftTreeCase("32 rows", 2, 15, 32, loudness=0.3),
    DraftTreeCase("nearly a chain", 2, 15, 16, loudness=20.0),
    DraftTreeCase("two levels", 1, 2, 20),
    DraftTreeCase("fewer nodes than rows", 1, 1, 12),
    DraftTreeCase("rows that are no power of two", 2, 6, 11, count=4),
)
LARGE_DRAFT_TREE = (DraftTreeCase("tree of 16 rows", 1, 15, 16), DraftTreeCase("tree of 32 rows", 1, 15, 32))
SMALL_MOVE_ROWS = (
    MoveRowsCase("one pool", (14,), 8, ((2, 16),), 16, 2),
    MoveRowsCase("pools of different heads", (21, 5), 16, ((2, 16), (2, 64), (1, 32), (3, 16)), 16, 3),
    MoveRowsCase("ring", (150, 60), 16, ((2, 32),) * 2, 16, 4, ring=True),
    MoveRowsCase("bf16, rows that are no power of two", (30, 3, 7), 11, ((3, 64),) * 4, 16, 3, dtype="bfloat16"),
)
LARGE_MOVE_ROWS = (
    MoveRowsCase("SmolLM2", (250,), 16, ((3, 64),) * 60, 128, 3, dtype="bfloat16"),
    MoveRowsCase(
        "Gemma 4 31B local, in a ring", (131_000,), 16, ((16, 256),) * 100, 128, 3, ring=True, dtype="bfloat16"
    ),
    MoveRowsCase("Gemma 4 31B global, compact", (250,), 16, ((4, 128), (4, 512)) * 10, 128, 3, dtype="bfloat16"),
)
