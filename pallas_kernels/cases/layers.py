"""Cases of what stands between the matmuls: residual_norm and attention_rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_rows.reference import HeadLayout
from pallas_kernels.cases import Seed


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
            jnp.asarray(parts, dtype_of_parts(self.parts, self.dtype)),
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
        of_parts = self.parts * numbers * dtype_of_parts(self.parts, self.dtype).itemsize
        return of_parts + 3 * numbers * width + 4 * self.dim * (1 + self.sandwich)

    @property
    def flops(self) -> int:
        """One sum for each part, four operations for each norm, one product with the factor."""
        return self.rows * self.dim * (self.parts + 4 * (1 + self.sandwich) + self.scaled)


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
            jnp.asarray(parts, dtype_of_parts(self.parts, self.dtype)),
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
        of_parts = self.parts * columns * dtype_of_parts(self.parts, self.dtype).itemsize
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


def dtype_of_parts(parts: int, dtype: str) -> np.dtype:
    """What `matmul_parts` leaves: shares of the inputs come in f32, a whole product in the dtype of the rows."""
    return jnp.dtype(dtype if parts == 1 else jnp.float32)


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
