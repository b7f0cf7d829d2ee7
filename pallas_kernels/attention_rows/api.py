"""From a projection to what attention reads: the public names."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention_rows import reference, triton
from pallas_kernels.attention_rows.reference import (
    HeadLayout,
    HeadNorms,
    Heads,
    KvPool,
    Tables,
    normed_heads,
    rotate,
)
from pallas_kernels.implementations import choose
from pallas_kernels.paged import why_not

__all__ = [
    "HeadLayout",
    "HeadNorms",
    "Heads",
    "KvPool",
    "Tables",
    "attention_rows",
    "normed_heads",
    "rotate",
]


def attention_rows(
    parts: Float[Array, "parts slots rows width"],
    pool: KvPool | None,
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    tables: Tables,
    *,
    layout: HeadLayout,
    norms: HeadNorms,
    dtype: DTypeLike,
    page_size: int,
    ring: bool = False,
    implementation: str | None = None,
) -> tuple[Heads, KvPool | None]:
    """Queries as `block_attention` takes them, and the pool with the rows' own K and V at token indices `starts..`.

    `parts` are what a linear map leaves, to be added up and rounded to `dtype`; their columns are as `layout` says.
    Heads get their `norms`, queries and keys are turned by `tables`, and in the compact form queries and keys take the
    shape that `block_attention` describes. Rows past a slot's last page land in page 0, which nobody reads; a `ring` of
    pages goes round instead. Without a pool (and with `kv_heads` 0) there are queries only.
    """
    if (pool is None) != (layout.kv_heads == 0):
        raise ValueError(
            f"{layout.kv_heads} heads of keys and {'no pool' if pool is None else 'a pool'}: give both or none"
        )
    held = None if pool is None else (pool[0].shape[1:], pool[1].shape[1:])
    if held not in (None, ((layout.kv_heads, layout.key_width), (layout.kv_heads, layout.head_dim))):
        raise ValueError(f"the pool has {held} numbers a token, which is not what {layout} says")
    if layout.compact and norms.keys is None:
        raise ValueError(f"in the compact form ({layout}) keys follow from values by the scale of their norm: give it")
    least = layout.column + layout.projected * layout.head_dim
    if parts.shape[3] < least:
        raise ValueError(f"the projection has {parts.shape[3]} columns, {layout} needs {least}")
    fits = why_not(page_size, layout.head_dim, layout.key_width) is None
    implementation = choose("attention_rows", implementation, triton_fits=fits)
    chosen = triton if implementation == "triton" else reference
    return chosen.attention_rows(
        parts, pool, page_table, starts, tables, layout=layout, norms=norms, dtype=dtype, page_size=page_size, ring=ring
    )
