"""Cases of block_attention, token_scoring and sparse_attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.cases import Seed
from pallas_kernels.sparse_attention.selection import Selection, SelectionRule, query_block_rows


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Arguments of block_attention: `lengths` has token indices of slots' first rows, `pages` is the table's width."""

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
    ring: bool = False
    key_dim: int | None = None
    """Numbers of a key beside those of its value, in the compact form."""
    tree: bool = False
    """The rows form a tree."""

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; pages of a slot are scattered over the pool."""
        generator = np.random.default_rng(seed)
        slots, dtype = len(self.lengths), jnp.dtype(self.dtype)
        tokens = (1 + slots * self.pages) * self.page_size
        width = self.head_dim + (self.key_dim or 0)
        queries = generator.standard_normal((slots, self.rows, self.heads, width), np.float32)
        widths = (self.key_dim or self.head_dim, self.head_dim)
        pools = [generator.standard_normal((tokens, self.kv_heads, each), np.float32) for each in widths]
        table = 1 + generator.permutation(slots * self.pages).astype(np.int32).reshape(slots, self.pages)
        positional = (
            jnp.asarray(queries, dtype),
            *(jnp.asarray(pool, dtype) for pool in pools),
            jnp.asarray(table),
            jnp.asarray(self.lengths, jnp.int32),
            *([_random_tree(slots, self.rows)] if self.tree else []),
        )
        keywords = {
            "page_size": self.page_size,
            "scale": self.head_dim**-0.5,
            "window": self.window,
            "causal": self.causal,
            "ring": self.ring,
            "compact": self.key_dim is not None,
        }
        return positional, keywords

    @property
    def bytes(self) -> int:
        """K and V that must be read."""
        width = jnp.dtype(self.dtype).itemsize * self.kv_heads * (self.head_dim + (self.key_dim or self.head_dim))
        seen = [length + self.rows for length in self.lengths]
        return sum(seen if self.window is None else [min(n, self.window + self.rows) for n in seen]) * width

    @property
    def flops(self) -> int:
        """Products of queries with keys, and of weights with values, that a row sees."""
        width = 2 * self.head_dim + (self.key_dim or 0)
        seen = sum(
            min(start + (row if self.causal else self.rows - 1) + 1, self.window or start + self.rows)
            for start in self.lengths
            for row in range(self.rows)
        )
        return 2 * seen * self.heads * width


def _random_tree(slots: int, rows: int) -> Ancestry:
    """Nodes that hang anywhere, deep ones as a rule."""
    generator = np.random.default_rng(rows)
    depths, sees = np.zeros((slots, rows), np.int32), np.ones((slots, rows), np.uint32)
    for slot, row in np.ndindex(slots, rows):
        if row:
            parent = int(generator.integers(max(0, row - 4), row))
            depths[slot, row] = depths[slot, parent] + 1
            sees[slot, row] = sees[slot, parent] | np.uint32(1 << row)
    return Ancestry(jnp.asarray(depths), jnp.asarray(sees))


def _in_a_ring(name: str, length: int, kv_heads: int, *, tree: bool = False) -> AttentionCase:
    """16 rows in one of Gemma 4's layers with a window."""
    sizes, how = (16, 2 * kv_heads, kv_heads, 256, 128, 17), {"window": 1024, "ring": True, "tree": tree}
    return AttentionCase(name, (length,), *sizes, dtype="bfloat16", **how)


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

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
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

    @property
    def flops(self) -> int:
        """Products of queries with keys."""
        return 2 * self.length * self.rows * self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class SelectionCase:
    """Arguments of select_blocks: queries of a block look into a direction of their own, and so do blocks of keys."""

    name: str
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    block_size: int = 128
    alpha: float = 0.12
    dtype: str = "float32"
    key_dim: int | None = None

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; scores of one query block spread so that few percent of 1,024 are kept."""
        generator = np.random.default_rng(seed)
        dtype, slots = jnp.dtype(self.dtype), len(self.starts)
        width = self.head_dim + (self.key_dim or 0)
        size, blocks = query_block_rows(self.rows, self.block_size)
        directions = generator.standard_normal((slots, blocks, 1, self.heads, width), np.float32)
        noise = generator.standard_normal((slots, blocks, size, self.heads, width), np.float32)
        queries = (directions + 0.3 * noise).reshape(slots, blocks * size, self.heads, width)[:, : self.rows]
        means = 1.3 * generator.standard_normal((slots, self.blocks, self.kv_heads, width), np.float32)
        positional = (
            jnp.asarray(queries, dtype),
            jnp.asarray(means, dtype),
            jnp.asarray(self.starts, jnp.int32),
            jnp.asarray(self.lengths, jnp.int32),
        )
        rule = SelectionRule(block_size=self.block_size, alpha=self.alpha)
        return positional, {"scale": width**-0.5, "rule": rule, "key_dim": self.key_dim}

    @property
    def bytes(self) -> int:
        """The means that rows see."""
        seen = sum((start + self.rows) // self.block_size for start in self.starts)
        return seen * self.kv_heads * (self.head_dim + (self.key_dim or 0)) * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """Products of queries with the means that they see."""
        seen = sum((start + row) // self.block_size + 1 for start in self.starts for row in range(self.rows))
        return 2 * seen * self.heads * (self.head_dim + (self.key_dim or 0))


@dataclasses.dataclass(frozen=True)
class SparseCase:
    """Arguments of attend_blocks: `kept` blocks for every query block, or all that it sees if these are fewer."""

    name: str
    starts: tuple[int, ...]
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    kept: int
    block_size: int = 128
    dtype: str = "float32"
    key_dim: int | None = None

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; blocks are drawn at random, the query block's own are always among them."""
        dense = AttentionCase(
            self.name,
            self.starts,
            self.rows,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.page_size,
            self.pages,
            dtype=self.dtype,
            key_dim=self.key_dim,
        )
        positional, keywords = dense.arguments(seed)
        generator = np.random.default_rng(seed)
        places = self.pages * self.page_size // self.block_size
        _, blocks = query_block_rows(self.rows, self.block_size)
        indices = np.zeros((len(self.starts), blocks, self.heads, places), np.int32)
        counts = np.zeros(indices.shape[:3], np.int32)
        for slot, block, own, seen in self._query_blocks():
            count = min(seen, max(self.kept, seen - own))
            for head in range(self.heads):
                chosen = [*generator.permutation(own)[: count - (seen - own)], *range(own, seen)]
                indices[slot, block, head, :count] = np.sort(chosen)
            counts[slot, block] = count
        selection = Selection(jnp.asarray(indices), jnp.asarray(counts))
        names = ("page_size", "scale", "compact")
        return (*positional, selection), {**{n: keywords[n] for n in names}, "block_size": self.block_size}

    def _query_blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """(slot, query block, blocks before its first row's, blocks that its last row sees) of all query blocks."""
        size, blocks = query_block_rows(self.rows, self.block_size)
        for slot, start in enumerate(self.starts):
            for block in range(blocks):
                last = start + min((block + 1) * size, self.rows) - 1
                yield slot, block, (start + block * size) // self.block_size, last // self.block_size + 1

    @property
    def bytes(self) -> int:
        """K and V of as many blocks as a query block reads: all query blocks could read the same."""
        width = self.kv_heads * (self.head_dim + (self.key_dim or self.head_dim)) * jnp.dtype(self.dtype).itemsize
        return (
            len(self.starts) * min(self.kept, self.pages * self.page_size // self.block_size) * self.block_size * width
        )

    @property
    def flops(self) -> int:
        """Products with the keys and values of the selected blocks; half of the query block's own."""
        width = 2 * self.head_dim + (self.key_dim or 0)
        size, _ = query_block_rows(self.rows, self.block_size)
        blocks = sum(min(seen, max(self.kept, seen - own)) - 0.5 for _, _, own, seen in self._query_blocks())
        return int(2 * blocks * self.block_size * size * self.heads * width)


SMALL_ATTENTION = (
    AttentionCase("one row", (37,), 1, 4, 2, 16, 16, 4),
    AttentionCase("block", (21, 5), 16, 6, 2, 32, 16, 4),
    AttentionCase("three heads share", (40,), 16, 9, 3, 64, 32, 2),
    AttentionCase("window", (50,), 16, 4, 2, 32, 16, 5, window=20),
    AttentionCase("window in a ring", (150, 5), 16, 4, 2, 32, 16, 4, window=20, ring=True),
    AttentionCase("bidirectional", (17,), 16, 4, 4, 32, 16, 4, causal=False),
    AttentionCase("chunk", (33,), 60, 4, 1, 32, 32, 4),
    AttentionCase("bf16", (37,), 16, 4, 2, 64, 32, 3, dtype="bfloat16"),
    AttentionCase("nothing before", (0,), 16, 2, 1, 16, 16, 1),
    AttentionCase("splits", (200, 3), 16, 4, 2, 32, 16, 16),
    AttentionCase("splits and window", (200,), 16, 4, 2, 32, 16, 16, window=40),
    AttentionCase("splits and window in a ring", (1000, 90), 16, 4, 2, 32, 16, 16, window=200, ring=True),
    AttentionCase("chunk in a ring", (333,), 60, 4, 1, 32, 16, 8, window=50, ring=True),
    AttentionCase("head of 512", (70,), 16, 4, 1, 512, 16, 6),
    AttentionCase("compact", (70, 3), 16, 4, 2, 64, 16, 6, key_dim=16),
    AttentionCase("compact, one row", (37,), 1, 4, 2, 64, 16, 4, key_dim=16),
    AttentionCase("compact head of 512", (70,), 16, 4, 1, 512, 16, 6, key_dim=128),
    AttentionCase("compact head of 512, tiles", (300, 5), 16, 8, 1, 512, 64, 6, dtype="bfloat16", key_dim=128),
    AttentionCase("chunk, heads of 64", (333,), 128, 3, 1, 64, 64, 9, dtype="bfloat16"),
    # Edges of blocks: rows that see one key less than whole blocks, or one more; windows alike.
    AttentionCase("chunk, heads of 128, two slots", (126, 65), 136, 4, 2, 128, 128, 3, dtype="bfloat16"),
    AttentionCase("chunk, heads of 256, window", (196,), 128, 2, 1, 256, 64, 6, dtype="bfloat16", window=70),
    AttentionCase(
        "chunk, wide window in a ring", (649,), 128, 2, 1, 64, 128, 4, dtype="bfloat16", window=200, ring=True
    ),
    # Rows that see alike: lines of a tile that are no rows, splits that have no key to see, a last tile that overlaps.
    AttentionCase("drafter", (130, 3), 16, 16, 2, 128, 64, 12, dtype="bfloat16", causal=False),
    AttentionCase("drafter, groups of 4", (0, 111), 16, 8, 2, 128, 128, 1, dtype="bfloat16", causal=False),
    AttentionCase("drafter, heads of 64 in groups of 3", (250,), 8, 3, 1, 64, 128, 4, dtype="bfloat16", causal=False),
    AttentionCase("drafter, two tiles", (103,), 24, 8, 1, 128, 64, 3, dtype="bfloat16", causal=False),
    AttentionCase("tree", (21, 5), 16, 6, 2, 32, 16, 4, tree=True),
    AttentionCase("tree, many splits", (150, 27), 16, 4, 2, 32, 16, 16, tree=True),
    AttentionCase("tree of 32 rows", (70,), 32, 4, 2, 32, 16, 12, tree=True),
    AttentionCase("tree, nothing before", (0,), 5, 2, 1, 16, 16, 1, tree=True),
    AttentionCase("tree, window smaller than its depth", (50, 3), 24, 4, 2, 32, 16, 5, window=6, tree=True),
    AttentionCase("tree in a ring", (150, 5), 16, 4, 2, 32, 16, 4, window=20, ring=True, tree=True),
    AttentionCase("compact tree", (70, 3), 16, 4, 2, 64, 16, 8, key_dim=16, tree=True),
    AttentionCase("compact tree, tiles", (300, 0), 16, 8, 1, 512, 64, 6, dtype="bfloat16", key_dim=128, tree=True),
    AttentionCase("compact tree of 12 rows", (120,), 12, 8, 1, 512, 64, 3, dtype="bfloat16", key_dim=128, tree=True),
)
LARGE_ATTENTION = (
    AttentionCase("SmolLM2 step, 8K", (8_000,), 16, 9, 3, 64, 128, 64, dtype="bfloat16"),
    AttentionCase("SmolLM2 chunk, 8K", (7_000,), 1024, 9, 3, 64, 128, 64, dtype="bfloat16"),
    AttentionCase("Qwen3-8B step, 32K", (32_000,), 16, 32, 8, 128, 128, 256, dtype="bfloat16"),
    AttentionCase("Gemma 3 27B local step, 32K", (32_000,), 16, 32, 16, 128, 128, 256, dtype="bfloat16", window=1024),
    AttentionCase("Gemma 4 31B local step, 32K", (32_000,), 16, 32, 16, 256, 128, 256, dtype="bfloat16", window=1024),
    _in_a_ring("Gemma 4 31B local step in a ring, 128K", 131_000, 16),
    AttentionCase("Gemma 4 31B global step, 4K of 32K", (4_000,), 16, 32, 4, 512, 128, 256, dtype="bfloat16"),
    AttentionCase("Gemma 4 31B global step, 32K", (32_000,), 16, 32, 4, 512, 128, 256, dtype="bfloat16"),
    AttentionCase(
        "Gemma 4 31B global step, compact, 32K", (32_000,), 16, 32, 4, 512, 128, 256, dtype="bfloat16", key_dim=128
    ),
    AttentionCase(
        "Gemma 4 31B global step, compact, 128K", (131_000,), 16, 32, 4, 512, 128, 1024, dtype="bfloat16", key_dim=128
    ),
    AttentionCase("SmolLM2 tree, 8K", (8_000,), 16, 9, 3, 64, 128, 64, dtype="bfloat16", tree=True),
    _in_a_ring("Gemma 4 31B local tree in a ring, 128K", 130_960, 16, tree=True),
    _in_a_ring("Gemma 4 26B-A4B local tree in a ring, 128K", 130_960, 8, tree=True),
    AttentionCase("Qwen3-8B tree of 32 rows, 32K", (32_000,), 32, 32, 8, 128, 128, 256, dtype="bfloat16", tree=True),
    AttentionCase("SmolLM2 drafter, 8K", (8_000,), 16, 9, 3, 64, 128, 64, dtype="bfloat16", causal=False),
    AttentionCase("Gemma 4 31B drafter, 4K of 32K", (4_000,), 16, 64, 8, 128, 128, 256, dtype="bfloat16", causal=False),
    AttentionCase("Gemma 4 31B drafter, 128K", (131_000,), 16, 64, 8, 128, 128, 1024, dtype="bfloat16", causal=False),
    AttentionCase("Qwen3-0.6B chunk, 128K", (129_024,), 1024, 16, 8, 128, 128, 1024, dtype="bfloat16"),
    AttentionCase("Gemma 4 31B local chunk, 8K", (7168,), 1024, 32, 16, 256, 128, 64, dtype="bfloat16", window=1024),
    AttentionCase(
        "Gemma 4 31B global chunk, compact, 8K", (7168,), 1024, 32, 4, 512, 128, 64, dtype="bfloat16", key_dim=128
    ),
    *(
        AttentionCase(
            f"Gemma 4 31B global tree{of}, compact, {context}",
            (start,),
            rows,
            32,
            4,
            512,
            128,
            pages,
            dtype="bfloat16",
            key_dim=128,
            tree=True,
        )
        for of, rows in (("", 16), (" of 32 rows", 32))
        for context, start, pages in (("32K", 32_000, 256), ("128K", 131_000, 1024))
    ),
)
SMALL_SCORING = (
    ScoringCase("mean", 70, 5, 4, 2, 32, 16, 6),
    ScoringCase("max", 70, 5, 4, 2, 32, 16, 6, reduce="max"),
    ScoringCase("rows as heads", 100, 1, 96, 3, 64, 32, 4, reduce="max"),
    ScoringCase("bf16", 33, 8, 9, 3, 64, 32, 2, dtype="bfloat16"),
    ScoringCase("one token", 1, 2, 2, 1, 16, 16, 2),
    ScoringCase("tiles of a group", 70, 1, 1200, 2, 64, 32, 4, reduce="max"),
    ScoringCase("tiles of a group, mean", 70, 2, 600, 1, 64, 32, 4, dtype="bfloat16"),
)
LARGE_SCORING = (
    ScoringCase("SmolLM2, 8K", 8_000, 1, 288, 3, 64, 128, 64, dtype="bfloat16", reduce="max"),
    ScoringCase("Qwen3-8B, 128K", 128_000, 1, 1024, 8, 128, 128, 1024, dtype="bfloat16", reduce="max"),
    ScoringCase("Gemma 4 31B local, 128K", 128_000, 1, 1024, 16, 256, 128, 1024, dtype="bfloat16", reduce="max"),
    ScoringCase("Gemma 4 31B global, 128K", 128_000, 1, 1024, 4, 512, 128, 1024, dtype="bfloat16", reduce="max"),
)
SMALL_SELECTION = (
    SelectionCase("one query block", (48,), (200,), 16, 4, 2, 16, 16, block_size=16),
    SelectionCase("not at a block's edge", (37,), (500,), 40, 4, 2, 32, 32, block_size=16),
    SelectionCase("two slots", (96, 5), (400, 300), 32, 6, 2, 16, 32, block_size=16),
    SelectionCase("end of a prompt", (160,), (199,), 48, 4, 4, 32, 16, block_size=16),
    SelectionCase("more blocks than a tile", (2_000,), (4_000,), 16, 2, 1, 16, 200, block_size=16),
    SelectionCase("few rows", (70,), (90,), 5, 2, 1, 16, 8, block_size=16),
    SelectionCase("everything", (128,), (999,), 32, 4, 2, 32, 16, block_size=16, alpha=0.0),
    SelectionCase("bf16", (160,), (999,), 32, 9, 3, 64, 16, block_size=16, dtype="bfloat16"),
    SelectionCase("compact", (160,), (999,), 32, 4, 1, 64, 16, block_size=16, key_dim=16),
    SelectionCase("blocks of 128", (300,), (2_000,), 200, 2, 1, 16, 12),
    SelectionCase("wide", (160,), (999,), 64, 2, 1, 512, 16, block_size=64, key_dim=128),
)
LARGE_SELECTION = (
    SelectionCase("SmolLM2 chunk, 8K", (7_000,), (8_100,), 1024, 9, 3, 64, 64, dtype="bfloat16"),
    SelectionCase("Qwen3-0.6B chunk, 128K", (129_024,), (140_000,), 1024, 16, 8, 128, 1024, dtype="bfloat16"),
)
SMALL_SPARSE = (
    SparseCase("one query block", (48,), 16, 4, 2, 16, 16, 4, 2, block_size=16),
    SparseCase("not at a block's edge", (37,), 40, 4, 2, 32, 32, 4, 3, block_size=16),
    SparseCase("two slots", (96, 5), 32, 6, 2, 16, 32, 4, 4, block_size=16),
    SparseCase("few rows", (70,), 5, 2, 1, 16, 16, 5, 2, block_size=16),
    SparseCase("all blocks", (100,), 60, 4, 2, 32, 32, 5, 99, block_size=16),
    SparseCase("bf16", (160,), 32, 9, 3, 64, 32, 6, 5, block_size=16, dtype="bfloat16"),
    SparseCase("compact", (70, 3), 32, 4, 2, 64, 16, 7, 3, block_size=16, key_dim=16),
    SparseCase("compact head of 512", (70,), 64, 4, 1, 512, 64, 3, 2, block_size=64, key_dim=128),
    SparseCase("blocks of 128", (300,), 200, 2, 1, 16, 256, 2, 2),
    # Ends inside of blocks; the second slot's first query block has two of its own.
    SparseCase("chunk, heads of 128, two slots", (300, 129), 200, 4, 2, 128, 256, 3, 3, dtype="bfloat16"),
    SparseCase("chunk, heads of 64, first rows", (0,), 256, 3, 1, 64, 128, 4, 1, dtype="bfloat16"),
    SparseCase("chunk, heads of 128, last rows", (333,), 256, 2, 1, 128, 128, 5, 99, dtype="bfloat16"),
    SparseCase("chunk, heads of 256", (200,), 128, 2, 1, 256, 128, 3, 2, dtype="bfloat16"),
)
LARGE_SPARSE = (
    SparseCase("SmolLM2 chunk, 8K", (7_000,), 1024, 9, 3, 64, 128, 64, 24, dtype="bfloat16"),
    SparseCase("Qwen3-0.6B chunk, 128K, 6 % of it", (129_024,), 1024, 16, 8, 128, 128, 1024, 62, dtype="bfloat16"),
    SparseCase("Qwen3-0.6B last rows, 128K", (130_816,), 256, 16, 8, 128, 128, 1024, 1024, dtype="bfloat16"),
)
