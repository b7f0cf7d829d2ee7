"""Named argument shapes that the tests, the benchmarks and the check on a device share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Arguments of block_attention. `lengths` has the token index of each slot's first row."""

    name: str
    lengths: tuple[int, ...]
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    dtype: str = "float32"
    window: int | None = None
    causal: bool = True

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; pages of a slot are scattered over the pool."""
        generator = np.random.default_rng(seed)
        slots, dtype = len(self.lengths), jnp.dtype(self.dtype)
        tokens = (1 + slots * self.pages) * self.page_size
        queries = generator.standard_normal((slots, self.rows, self.heads, self.head_dim), np.float32)
        pools = [generator.standard_normal((tokens, self.kv_heads, self.head_dim), np.float32) for _ in range(2)]
        table = 1 + generator.permutation(slots * self.pages).astype(np.int32).reshape(slots, self.pages)
        positional = (
            jnp.asarray(queries, dtype),
            *(jnp.asarray(pool, dtype) for pool in pools),
            jnp.asarray(table),
            jnp.asarray(self.lengths, jnp.int32),
        )
        keywords = {
            "page_size": self.page_size,
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "causal": self.causal,
        }
        return positional, keywords

    @property
    def bytes(self) -> int:
        """K and V that must be read."""
        width = jnp.dtype(self.dtype).itemsize * self.kv_heads * self.head_dim * 2
        seen = [length + self.rows for length in self.lengths]
        return sum(seen if self.window is None else [min(n, self.window + self.rows) for n in seen]) * width


@dataclasses.dataclass(frozen=True)
class ScoringCase:
    """Arguments of token_scores."""

    name: str
    length: int
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    dtype: str = "float32"
    reduce: str = "mean"

    def arguments(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        generator = np.random.default_rng(seed)
        dtype = jnp.dtype(self.dtype)
        queries = generator.standard_normal((self.rows, self.heads, self.head_dim), np.float32)
        pool = generator.standard_normal(((1 + self.pages) * self.page_size, self.kv_heads, self.head_dim), np.float32)
        table = 1 + generator.permutation(self.pages).astype(np.int32)
        positional = (jnp.asarray(queries, dtype), jnp.asarray(pool, dtype), jnp.asarray(table), jnp.int32(self.length))
        return positional, {"page_size": self.page_size, "scale": self.head_dim**-0.5, "reduce": self.reduce}

    @property
    def bytes(self) -> int:
        """K that must be read; twice, because statistics come before shares."""
        return 2 * self.length * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


SMALL_ATTENTION = (
    AttentionCase("one row", (37,), 1, 4, 2, 16, 16, 4),
    AttentionCase("block", (21, 5), 16, 6, 2, 32, 16, 4),
    AttentionCase("three heads share", (40,), 16, 9, 3, 64, 32, 2),
    AttentionCase("window", (50,), 16, 4, 2, 32, 16, 5, window=20),
    AttentionCase("bidirectional", (17,), 16, 4, 4, 32, 16, 4, causal=False),
    AttentionCase("chunk", (33,), 60, 4, 1, 32, 32, 4),
    AttentionCase("bf16", (37,), 16, 4, 2, 64, 32, 3, dtype="bfloat16"),
    AttentionCase("nothing before", (0,), 16, 2, 1, 16, 16, 1),
)
LARGE_ATTENTION = (
    AttentionCase("SmolLM2 step, 8K", (8_000,), 16, 9, 3, 64, 128, 64, dtype="bfloat16"),
    AttentionCase("SmolLM2 chunk, 8K", (7_000,), 1024, 9, 3, 64, 128, 64, dtype="bfloat16"),
    AttentionCase("Qwen3-8B step, 32K", (32_000,), 16, 32, 8, 128, 128, 256, dtype="bfloat16"),
    AttentionCase("Gemma 3 27B local step, 32K", (32_000,), 16, 32, 16, 128, 128, 256, dtype="bfloat16", window=1024),
    AttentionCase("head of 256, 8K", (8_000,), 16, 16, 8, 256, 128, 64, dtype="bfloat16"),
)
SMALL_SCORING = (
    ScoringCase("mean", 70, 5, 4, 2, 32, 16, 6),
    ScoringCase("max", 70, 5, 4, 2, 32, 16, 6, reduce="max"),
    ScoringCase("rows as heads", 100, 1, 96, 3, 64, 32, 4, reduce="max"),
    ScoringCase("bf16", 33, 8, 9, 3, 64, 32, 2, dtype="bfloat16"),
    ScoringCase("one token", 1, 2, 2, 1, 16, 16, 2),
)
LARGE_SCORING = (
    ScoringCase("SmolLM2, 8K", 8_000, 1, 288, 3, 64, 128, 64, dtype="bfloat16", reduce="max"),
    ScoringCase("Qwen3-8B, 128K", 128_000, 1, 1024, 8, 128, 128, 1024, dtype="bfloat16", reduce="max"),
)
