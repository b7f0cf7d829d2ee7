"""Named argument shapes that the tests, the benchmarks and the check on a device share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_rows.reference import HeadLayout
from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.quantised_matmul.weights import BLOCK, W4, W8
from pallas_kernels.sparse_attention.selection import Selection, SelectionRule, query_block_rows

Seed = int | np.random.Generator
"""What the numbers of a case are drawn with."""


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


@dataclasses.dataclass(frozen=True)
class MatmulCase:
    """Arguments of a matmul: `rows` of `inputs` numbers, `outputs` numbers out; `weights` are w4, w8 or dense."""

    name: str
    rows: int
    inputs: int
    outputs: int
    weights: str = "w4"
    group_size: int = 32
    dtype: str = "bfloat16"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; random words, every nibble and scale of its own."""
        generator = np.random.default_rng(seed)
        x = generator.standard_normal((self.rows, self.inputs), np.float32)
        if self.weights == "dense":
            values = generator.standard_normal((self.outputs, self.inputs), np.float32)
            return (jnp.asarray(x, self.dtype), jnp.asarray(values, self.dtype)), {}
        if self.weights == "w8":
            values = generator.integers(-127, 128, (self.outputs, self.inputs), dtype=np.int8)
            scales = generator.uniform(0.5, 1.5, self.outputs).astype(np.float32) / 2000
            return (jnp.asarray(x, self.dtype), W8(jnp.asarray(values), jnp.asarray(scales))), {}
        padded = -(-self.inputs // BLOCK) * BLOCK
        packed = generator.integers(-(2**15), 2**15, (padded // 4, self.outputs), dtype=np.int16)
        scales = generator.uniform(0.5, 1.5, (padded // self.group_size, self.outputs)).astype(np.float32) / 100
        weight = W4(jnp.asarray(packed), jnp.asarray(scales, jnp.float16), self.group_size)
        return (jnp.asarray(x, self.dtype), weight), {}

    @property
    def bytes(self) -> int:
        """The weight, which must be read once."""
        if self.weights == "dense":
            return self.inputs * self.outputs * jnp.dtype(self.dtype).itemsize
        if self.weights == "w8":
            return self.inputs * self.outputs
        return self.inputs * self.outputs // 2 + 2 * self.inputs * self.outputs // self.group_size

    @property
    def flops(self) -> int:
        """One product per weight and row."""
        return 2 * self.rows * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """Arguments of grouped_matmul: rows that choose `active` of `groups` matrices each, at random or all `alike`.

    `gated` has gate and up in a matrix, with twice as many outputs as come out.
    """

    name: str
    rows: int
    active: int
    groups: int
    inputs: int
    outputs: int
    gated: bool = False
    alike: bool = False
    weights: str = "w4"
    group_size: int = 32
    dtype: str = "bfloat16"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        activation = {"activation": _gelu} if self.gated else {}
        return (*self._matrices.arguments(seed)[0], jnp.asarray(self.chosen)), {"groups": self.groups, **activation}

    @property
    def chosen(self) -> np.ndarray:
        """Numbers of groups, the same for every seed: they decide what must be read."""
        generator = np.random.default_rng(self.rows)
        choices = [generator.permutation(self.groups)[: self.active] for _ in range(self.rows)]
        return np.stack([choices[0]] * self.rows if self.alike else choices).astype(np.int32)

    @property
    def bytes(self) -> int:
        """The matrices that somebody chose."""
        return self._matrices.bytes // self.groups * len(np.unique(self.chosen))

    @property
    def flops(self) -> int:
        """One product per row and weight of a matrix that it chose."""
        return 2 * self.rows * self.active * self.inputs * self.outputs * (2 if self.gated else 1)

    @property
    def _matrices(self) -> MatmulCase:
        outputs = self.groups * self.outputs * (2 if self.gated else 1)
        return MatmulCase(self.name, self.rows, self.inputs, outputs, self.weights, self.group_size, self.dtype)


_gelu = functools.partial(jax.nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True)
class ExpertChoiceCase:
    """Arguments of choose_experts; with `alone`, all rows are treated as the last one."""

    name: str
    rows: int
    dim: int
    experts: int
    active: int
    alone: bool = False
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        generator = np.random.default_rng(seed)
        x, router = (generator.standard_normal((rows, self.dim), np.float32) for rows in (self.rows, self.experts))
        router_scale, expert_scale, scale = (
            jnp.asarray(generator.uniform(0.5, 1.5, size), jnp.float32) for size in (self.dim, self.experts, self.dim)
        )
        source = jnp.full(self.rows, self.rows - 1, jnp.int32) if self.alone else None
        router_scale = router_scale * self.dim**-0.5
        positional = (jnp.asarray(x, self.dtype), jnp.asarray(router), router_scale, expert_scale, scale, source)
        return positional, {"active": self.active, "eps": 1e-6}

    @property
    def bytes(self) -> int:
        """The router and its scales; rows that must be read, and written with their norm."""
        rows = 2 * self.rows * self.dim * jnp.dtype(self.dtype).itemsize
        return 4 * (self.experts * (self.dim + 1) + 2 * self.dim) + rows

    @property
    def flops(self) -> int:
        """Scores."""
        return 2 * self.rows * self.experts * self.dim


@dataclasses.dataclass(frozen=True)
class ExpertSumCase:
    """Arguments of expert_sum."""

    name: str
    rows: int
    active: int
    dim: int
    parts: int
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; one part is of the case's dtype, several are f32."""
        generator = np.random.default_rng(seed)
        back = generator.standard_normal((self.rows, self.active, self.dim), np.float32)
        parts = generator.standard_normal((self.parts, self.rows, self.dim), np.float32)
        weights = jnp.asarray(generator.uniform(0.05, 0.3, (self.rows, self.active)), jnp.float32)
        scales = [jnp.asarray(generator.uniform(0.5, 1.5, self.dim), jnp.float32) for _ in range(2)]
        parts = jnp.asarray(parts, _dtype_of_parts(self.parts, self.dtype))
        return (jnp.asarray(back, self.dtype), weights, scales[0], parts, scales[1]), {"eps": 1e-6}

    @property
    def bytes(self) -> int:
        """What came back, the parts and the scales that must be read, and what must be written."""
        width, part_width = (jnp.dtype(each).itemsize for each in (self.dtype, _dtype_of_parts(self.parts, self.dtype)))
        return self.rows * self.dim * ((self.active + 1) * width + self.parts * part_width) + 8 * self.dim

    @property
    def flops(self) -> int:
        """A product and a sum for each expert, one sum for each part, four operations for each norm."""
        return self.rows * self.dim * (2 * self.active + self.parts + 8)


@dataclasses.dataclass(frozen=True)
class ResidualNormCase:
    """Arguments of residual_norm, those that may be None last: `sandwich` has a post_scale, `scaled` a factor."""

    name: str
    rows: int
    dim: int
    parts: int
    sandwich: bool = False
    scaled: bool = False
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; one part is of the case's dtype, several are f32."""
        generator = np.random.default_rng(seed)
        parts = generator.standard_normal((self.parts, self.rows, self.dim), np.float32)
        stream = generator.standard_normal((self.rows, self.dim), np.float32)
        scale, post_scale, factor = (
            jnp.asarray(generator.uniform(0.5, 1.5, size), jnp.float32) for size in (self.dim, self.dim, 1)
        )
        positional = (
            jnp.asarray(parts, _dtype_of_parts(self.parts, self.dtype)),
            jnp.asarray(stream, self.dtype),
            scale,
            post_scale if self.sandwich else None,
            factor if self.scaled else None,
        )
        return positional, {"eps": 1e-6}

    @property
    def bytes(self) -> int:
        """Parts, stream and scales that must be read, stream and norm that must be written."""
        numbers, width = self.rows * self.dim, jnp.dtype(self.dtype).itemsize
        of_parts = self.parts * numbers * _dtype_of_parts(self.parts, self.dtype).itemsize
        return of_parts + 3 * numbers * width + 4 * self.dim * (1 + self.sandwich)

    @property
    def flops(self) -> int:
        """One sum for each part, four operations for each norm, one product with the factor."""
        return self.rows * self.dim * (self.parts + 4 * (1 + self.sandwich) + self.scaled)


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


@dataclasses.dataclass(frozen=True)
class AttentionRowsCase:
    """Arguments of attention_rows, with the scales of its norms among the arrays: `norms` are letters of "qkv".

    `starts` has token indices of slots' first rows, `pages` is the table's width, `beside` has columns of the
    projection that come behind the layout's.
    """

    name: str
    starts: tuple[int, ...]
    rows: int
    layout: HeadLayout
    page_size: int
    pages: int
    parts: int = 1
    norms: str = ""
    ring: bool = False
    beside: int = 0
    dtype: str = "float32"

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments; RoPE's angles are random, those of pairs that narrow keys leave out 0."""
        generator = np.random.default_rng(seed)
        slots, layout, half = len(self.starts), self.layout, self.layout.head_dim // 2
        columns = layout.column + layout.projected * layout.head_dim + self.beside
        parts = generator.standard_normal((self.parts, slots, self.rows, columns), np.float32)
        query_scale, key_scale = (
            jnp.asarray(generator.uniform(0.5, 1.5, layout.head_dim), jnp.float32) for _ in range(2)
        )
        tokens = (1 + slots * self.pages) * self.page_size
        pools = [
            generator.standard_normal((tokens, layout.kv_heads, width), np.float32)
            for width in (layout.key_width, layout.head_dim)
        ]
        table = 1 + generator.permutation(slots * self.pages).astype(np.int32).reshape(slots, self.pages)
        angles = jnp.asarray(generator.uniform(-3, 3, (slots, self.rows, 1, half)), jnp.float32)
        turned = np.arange(half) < layout.key_width // 2
        angles = jnp.where(turned[None, None, None, :], angles, 0.0)
        positional = (
            jnp.asarray(parts, _dtype_of_parts(self.parts, self.dtype)),
            query_scale if "q" in self.norms else None,
            key_scale if "k" in self.norms else None,
            tuple(jnp.asarray(pool, self.dtype) for pool in pools) if layout.kv_heads else None,
            jnp.asarray(table),
            jnp.asarray(self.starts, jnp.int32),
            (jnp.cos(angles), jnp.sin(angles)),
        )
        keywords = {
            "layout": layout,
            "norm_values": "v" in self.norms,
            "eps": 1e-6,
            "dtype": self.dtype,
            "page_size": self.page_size,
            "ring": self.ring,
        }
        return positional, keywords

    @property
    def bytes(self) -> int:
        """Columns of all parts and RoPE's angles that must be read; queries, keys and values that must be written."""
        layout, width = self.layout, jnp.dtype(self.dtype).itemsize
        columns = layout.projected * layout.head_dim
        of_parts = self.parts * columns * _dtype_of_parts(self.parts, self.dtype).itemsize
        queries = layout.heads * (layout.head_dim + (layout.key_width if layout.compact else 0))
        written = queries + layout.kv_heads * (layout.key_width + layout.head_dim)
        return len(self.starts) * self.rows * (of_parts + 4 * layout.head_dim + written * width)

    @property
    def flops(self) -> int:
        """One sum for each part, four operations for a number's norm, three to turn it."""
        layout = self.layout
        heads = {"q": layout.heads, "k": layout.kv_heads, "v": layout.kv_heads}
        sums = (self.parts - 1) * layout.projected
        work = sums + 4 * sum(heads[kind] for kind in self.norms) + 3 * (layout.heads + layout.kv_heads)
        return len(self.starts) * self.rows * layout.head_dim * work


def _dtype_of_parts(parts: int, dtype: str) -> np.dtype:
    """What `matmul_parts` leaves: shares of the inputs come in f32, a whole product in the dtype of the rows."""
    return jnp.dtype(dtype if parts == 1 else jnp.float32)


SMALL_MATMUL = (
    MatmulCase("w4 by 32", 16, 256, 128),
    MatmulCase("w4 by 128", 16, 384, 256, group_size=128),
    MatmulCase("one row", 1, 256, 128),
    MatmulCase("twenty rows", 20, 256, 128),
    MatmulCase("padded inputs", 16, 200, 128),
    MatmulCase("odd outputs", 16, 256, 192),
    MatmulCase("w8", 16, 256, 128, weights="w8"),
    MatmulCase("w8, odd sizes", 5, 192, 160, weights="w8"),
    MatmulCase("dense", 16, 256, 128, weights="dense"),
    MatmulCase("dense, odd sizes", 5, 192, 160, weights="dense"),
    MatmulCase("dense, one block", 16, 32, 64, weights="dense"),
)
LARGE_MATMUL = (
    MatmulCase("Gemma 4 31B gate and up", 16, 5376, 43_008),
    MatmulCase("Gemma 4 31B down", 16, 21_504, 5376),
    MatmulCase("Gemma 4 31B local qkv", 16, 5376, 16_384),
    MatmulCase("Gemma 4 31B local o", 16, 8192, 5376),
    MatmulCase("Gemma 4 31B global qk", 16, 5376, 18_432),
    MatmulCase("Gemma 4 31B global o", 16, 16_384, 5376),
    MatmulCase("Gemma 4 31B head, w8", 16, 5376, 262_144, weights="w8"),
    MatmulCase("Gemma 4 31B gate and up, groups of 128", 16, 5376, 43_008, group_size=128),
    MatmulCase("Gemma 4 31B gate and up, 32 rows", 32, 5376, 43_008),
    MatmulCase("Qwen3-8B gate and up", 16, 4096, 24_576),
    MatmulCase("SmolLM2 gate and up", 16, 576, 3072),
    MatmulCase("Qwen3-8B gate and up, w8", 16, 4096, 24_576, weights="w8"),
    MatmulCase("Gemma 4 31B drafter gate and up, dense", 16, 5376, 21_504, weights="dense"),
    MatmulCase("SmolLM2 head, dense", 16, 576, 49_152, weights="dense"),
    MatmulCase("SmolLM2 gate and up, dense", 16, 576, 3072, weights="dense"),
    MatmulCase("SmolLM2 qkv, dense", 16, 576, 960, weights="dense"),
    MatmulCase("SmolLM2 o, dense", 16, 576, 576, weights="dense"),
    MatmulCase("SmolLM2 down, dense", 16, 1536, 576, weights="dense"),
)
SMALL_GROUPED = (
    GroupedCase("w4 by 32", 16, 4, 16, 256, 64),
    GroupedCase("gated", 16, 4, 16, 256, 64, gated=True),
    GroupedCase("gated, groups of 128", 5, 3, 8, 256, 32, gated=True, group_size=128),
    GroupedCase("padded inputs", 16, 2, 4, 200, 96),
    GroupedCase("one row", 1, 8, 128, 128, 32, gated=True),
    GroupedCase("one group for all", 64, 1, 8, 128, 64, alike=True),
    GroupedCase("alike", 40, 3, 8, 128, 64, gated=True, alike=True),
    GroupedCase("sorted", 130, 4, 64, 128, 32, gated=True),
    GroupedCase("sorted, many of a group", 300, 2, 4, 200, 64),
    GroupedCase("w8", 16, 4, 8, 192, 64, gated=True, weights="w8"),
    GroupedCase("dense", 16, 4, 8, 192, 64, gated=True, weights="dense"),
)
LARGE_GROUPED = (
    GroupedCase("Gemma 4 26B-A4B gate and up", 16, 8, 128, 2816, 704, gated=True),
    GroupedCase("Gemma 4 26B-A4B down", 128, 1, 128, 704, 2816),
    GroupedCase("Gemma 4 26B-A4B gate and up, plain step", 16, 8, 128, 2816, 704, gated=True, alike=True),
    GroupedCase("Gemma 4 26B-A4B gate and up, groups of 128", 16, 8, 128, 2816, 704, gated=True, group_size=128),
    GroupedCase("Gemma 4 26B-A4B gate and up, 64 rows", 64, 8, 128, 2816, 704, gated=True),
    GroupedCase("Gemma 4 26B-A4B gate and up, chunk of 128", 128, 8, 128, 2816, 704, gated=True),
    GroupedCase("Gemma 4 26B-A4B down, chunk of 128", 1024, 1, 128, 704, 2816),
)
SMALL_EXPERT_CHOICE = (
    ExpertChoiceCase("one row", 1, 64, 16, 2),
    ExpertChoiceCase("three of 48", 20, 96, 48, 3),
    ExpertChoiceCase("bf16", 16, 256, 128, 8, dtype="bfloat16"),
    ExpertChoiceCase("alone", 16, 128, 32, 4, alone=True),
)
LARGE_EXPERT_CHOICE = (
    ExpertChoiceCase("Gemma 4 26B-A4B step", 16, 2816, 128, 8, dtype="bfloat16"),
    ExpertChoiceCase("Gemma 4 26B-A4B plain step", 16, 2816, 128, 8, alone=True, dtype="bfloat16"),
    ExpertChoiceCase("Gemma 4 26B-A4B chunk", 1024, 2816, 128, 8, dtype="bfloat16"),
)
SMALL_EXPERT_SUM = (
    ExpertSumCase("one row", 1, 2, 64, 1),
    ExpertSumCase("splits", 5, 3, 96, 4),
    ExpertSumCase("bf16", 16, 8, 352, 3, dtype="bfloat16"),
)
LARGE_EXPERT_SUM = (
    ExpertSumCase("Gemma 4 26B-A4B step", 16, 8, 2816, 3, dtype="bfloat16"),
    ExpertSumCase("Gemma 4 26B-A4B chunk", 1024, 8, 2816, 1, dtype="bfloat16"),
)
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
    AttentionCase(
        "Gemma 4 31B local step in a ring, 128K",
        (131_000,),
        16,
        32,
        16,
        256,
        128,
        17,
        dtype="bfloat16",
        window=1024,
        ring=True,
    ),
    AttentionCase("Gemma 4 31B global step, 4K of 32K", (4_000,), 16, 32, 4, 512, 128, 256, dtype="bfloat16"),
    AttentionCase("Gemma 4 31B global step, 32K", (32_000,), 16, 32, 4, 512, 128, 256, dtype="bfloat16"),
    AttentionCase(
        "Gemma 4 31B global step, compact, 32K", (32_000,), 16, 32, 4, 512, 128, 256, dtype="bfloat16", key_dim=128
    ),
    AttentionCase(
        "Gemma 4 31B global step, compact, 128K", (131_000,), 16, 32, 4, 512, 128, 1024, dtype="bfloat16", key_dim=128
    ),
    AttentionCase("SmolLM2 tree, 8K", (8_000,), 16, 9, 3, 64, 128, 64, dtype="bfloat16", tree=True),
    AttentionCase("Qwen3-8B tree of 32 rows, 32K", (32_000,), 32, 32, 8, 128, 128, 256, dtype="bfloat16", tree=True),
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
)
LARGE_SCORING = (
    ScoringCase("SmolLM2, 8K", 8_000, 1, 288, 3, 64, 128, 64, dtype="bfloat16", reduce="max"),
    ScoringCase("Qwen3-8B, 128K", 128_000, 1, 1024, 8, 128, 128, 1024, dtype="bfloat16", reduce="max"),
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
)
LARGE_SPARSE = (
    SparseCase("SmolLM2 chunk, 8K", (7_000,), 1024, 9, 3, 64, 128, 64, 24, dtype="bfloat16"),
    SparseCase("Qwen3-0.6B chunk, 128K, 6 % of it", (129_024,), 1024, 16, 8, 128, 128, 1024, 62, dtype="bfloat16"),
    SparseCase("Qwen3-0.6B last rows, 128K", (130_816,), 256, 16, 8, 128, 128, 1024, 1024, dtype="bfloat16"),
)
SMALL_RESIDUAL_NORM = (
    ResidualNormCase("one part", 16, 64, 1),
    ResidualNormCase("parts", 5, 96, 3),
    ResidualNormCase("sandwich", 16, 200, 4, sandwich=True),
    ResidualNormCase("sandwich and factor", 3, 96, 2, sandwich=True, scaled=True),
    ResidualNormCase("factor", 1, 64, 1, scaled=True),
    ResidualNormCase("bf16", 16, 96, 3, dtype="bfloat16"),
    ResidualNormCase("bf16, one part", 9, 64, 1, dtype="bfloat16"),
    ResidualNormCase("bf16, sandwich and factor", 16, 200, 6, sandwich=True, scaled=True, dtype="bfloat16"),
)
LARGE_RESIDUAL_NORM = (
    ResidualNormCase("Gemma 4 31B, 4 parts", 16, 5376, 4, sandwich=True, scaled=True, dtype="bfloat16"),
    ResidualNormCase("Gemma 4 31B, 6 parts", 16, 5376, 6, sandwich=True, scaled=True, dtype="bfloat16"),
    ResidualNormCase("SmolLM2, 3 parts", 16, 576, 3, dtype="bfloat16"),
)
SMALL_ATTENTION_ROWS = (
    AttentionRowsCase("no norms", (21,), 5, HeadLayout(4, 2, 32, 32), 16, 3),
    AttentionRowsCase("one row", (15,), 1, HeadLayout(2, 1, 16, 16), 16, 2, norms="qk"),
    AttentionRowsCase("two slots", (21, 5), 16, HeadLayout(6, 2, 32, 32), 16, 3, parts=3, norms="qkv"),
    AttentionRowsCase("queries only", (21,), 16, HeadLayout(4, 0, 32, 32), 16, 3, parts=2, norms="q"),
    AttentionRowsCase(
        "keys and values only, among other columns",
        (21,),
        16,
        HeadLayout(0, 2, 32, 32, column=40),
        16,
        3,
        norms="k",
        beside=24,
    ),
    AttentionRowsCase("past the last page", (40, 3), 16, HeadLayout(4, 2, 32, 32), 16, 3, norms="qk"),
    AttentionRowsCase("ring", (150, 60), 16, HeadLayout(4, 2, 32, 32), 16, 4, parts=2, norms="qkv", ring=True),
    AttentionRowsCase("values are keys", (21,), 5, HeadLayout(4, 2, 32, 32, True), 16, 3, norms="qkv"),
    AttentionRowsCase("compact", (21, 5), 16, HeadLayout(4, 2, 64, 16, True), 16, 3, parts=3, norms="qkv"),
    AttentionRowsCase("bf16, no norms", (30,), 16, HeadLayout(9, 3, 64, 64), 32, 2, dtype="bfloat16"),
    AttentionRowsCase("bf16", (30,), 16, HeadLayout(4, 2, 64, 64), 32, 2, parts=2, norms="qkv", dtype="bfloat16"),
    AttentionRowsCase(
        "bf16, compact", (21,), 16, HeadLayout(4, 1, 64, 16, True), 16, 3, parts=3, norms="qkv", dtype="bfloat16"
    ),
)
LARGE_ATTENTION_ROWS = (
    AttentionRowsCase(
        "Gemma 4 31B local, in a ring",
        (131_000,),
        16,
        HeadLayout(32, 16, 256, 256),
        128,
        3,
        parts=2,
        norms="qkv",
        ring=True,
        dtype="bfloat16",
    ),
    AttentionRowsCase(
        "Gemma 4 31B global, compact",
        (250,),
        16,
        HeadLayout(32, 4, 512, 128, True),
        128,
        3,
        parts=3,
        norms="qkv",
        dtype="bfloat16",
    ),
    AttentionRowsCase("SmolLM2", (250,), 16, HeadLayout(9, 3, 64, 64), 128, 3, parts=3, dtype="bfloat16"),
    AttentionRowsCase("SmolLM2 chunk", (100,), 1024, HeadLayout(9, 3, 64, 64), 128, 9, dtype="bfloat16"),
    AttentionRowsCase(
        "Gemma 4 31B drafter, queries", (250,), 16, HeadLayout(64, 0, 128, 128), 128, 3, norms="q", dtype="bfloat16"
    ),
    AttentionRowsCase(
        "Gemma 4 31B drafter, keys and values",
        (250,),
        16,
        HeadLayout(0, 8, 128, 128),
        128,
        3,
        parts=4,
        norms="k",
        dtype="bfloat16",
    ),
)
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
