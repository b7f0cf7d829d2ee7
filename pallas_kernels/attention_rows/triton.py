"""Norms, RoPE and the writing of K and V as one Pallas Triton kernel: a program per row and head.

Every program adds up the parts of its head's two halves (RoPE turns number d together with number d + head_dim / 2),
norms and turns them, and writes them where attention looks for them: queries to an array of their own, keys and values
to their page. The pools are written in place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention_rows.reference import HeadLayout, HeadNorms, Heads, KvPool, Tables
from pallas_kernels.paged import pool_row, why_not


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
    ring: bool,
    interpret: bool = False,
) -> tuple[Heads, KvPool | None]:
    """See `api.attention_rows`. Raises NotImplementedError for sizes that are not powers of two."""
    if reason := why_not(page_size, layout.head_dim, layout.key_width):
        raise NotImplementedError(f"attention_rows on Triton {reason}")
    query_scale = _ones(layout.head_dim) if norms.queries is None else norms.queries
    key_scale = _ones(layout.head_dim) if norms.keys is None else norms.keys
    flags = (norms.queries is not None, norms.keys is not None, norms.values)
    queries, *new_pool = _run(
        parts,
        () if pool is None else pool,
        (page_table, starts, *(table[:, :, 0] for table in tables), query_scale, key_scale),
        layout=layout,
        normed=flags,
        eps=norms.eps,
        dtype=jnp.dtype(dtype),
        page_size=page_size,
        ring=ring,
        interpret=interpret,
    )
    # No output can be empty, so without queries there is a head that nobody wrote.
    return queries[:, :, : layout.heads], None if pool is None else (new_pool[0], new_pool[1])


def _ones(count: int) -> Float[Array, " count"]:
    return jnp.ones(count, jnp.float32)


@functools.partial(jax.jit, static_argnames=("layout", "normed", "eps", "dtype", "page_size", "ring", "interpret"))
def _run(
    parts: Array,
    pool: tuple[Array, ...],
    others: tuple[Array, ...],
    *,
    layout: HeadLayout,
    normed: tuple[bool, bool, bool],
    eps: float,
    dtype: jnp.dtype,
    page_size: int,
    ring: bool,
    interpret: bool,
) -> tuple[Array, ...]:
    slots, rows = parts.shape[1:3]
    kernel = functools.partial(
        _kernel, layout=layout, normed=normed, eps=eps, page_size=page_size, ring=ring, stores=bool(pool)
    )
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    width = layout.head_dim + (layout.key_width if layout.compact else 0)
    queries = jax.ShapeDtypeStruct((slots, rows, max(1, layout.heads), width), dtype)
    return pl.pallas_call(
        kernel,
        grid=(slots * rows, layout.heads + 2 * layout.kv_heads),
        in_specs=[whole] * (1 + len(pool) + len(others)),
        out_specs=[whole] * (1 + len(pool)),
        out_shape=[queries, *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in pool)],
        input_output_aliases={1 + index: 1 + index for index in range(len(pool))},
        compiler_params=plt.CompilerParams(num_warps=max(1, layout.head_dim // 128), num_stages=1),
        interpret=interpret,
        name="attention_rows",
    )(parts, *pool, *others)


def _kernel(
    parts_ref,
    *refs,
    layout: HeadLayout,
    normed: tuple[bool, bool, bool],
    eps: float,
    page_size: int,
    ring: bool,
    stores: bool,
) -> None:
    *inputs, queries_ref = refs[: len(refs) - 2 * stores]
    table_ref, starts_ref, cos_ref, sin_ref, query_scale_ref, key_scale_ref = inputs[2 * stores :]
    (count, _, rows, _), half = parts_ref.shape, layout.head_dim // 2
    slot, row = jax.lax.div(pl.program_id(0), rows), jax.lax.rem(pl.program_id(0), rows)
    head, keys, values = pl.program_id(1), layout.heads, layout.heads + layout.kv_heads
    source = jnp.where(head >= values, head - layout.kv_heads, head) if layout.values_are_keys else head
    halves = [pl.ds(layout.column + source * layout.head_dim + start, half) for start in (0, half)]
    dtype = queries_ref.dtype

    def by_kind(query, key, value):
        return jnp.where(head < keys, query, jnp.where(head < values, key, value))

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    def load(columns):
        total = plt.load(parts_ref.at[jnp.int32(0), slot, row, columns]).astype(jnp.float32)
        for part in range(1, count):
            total += plt.load(parts_ref.at[jnp.int32(part), slot, row, columns]).astype(jnp.float32)
        return rounded(total)

    # All loads come first: behind a sum over the head each would cost a round trip through memory.
    cos, sin = plt.load(cos_ref.at[slot, row, :]), plt.load(sin_ref.at[slot, row, :])
    key_scales = query_scales = []
    if any(normed) or layout.compact:
        query_scales, key_scales = (
            [plt.load(ref.at[part]) for part in (pl.ds(0, half), pl.ds(half, half))]
            for ref in (query_scale_ref, key_scale_ref)
        )
    if stores:
        target = pool_row(table_ref, slot, starts_ref[slot] + row, page_size, ring)
    pair = [load(columns) for columns in halves]
    if any(normed):
        mean = (jnp.sum(pair[0] * pair[0]) + jnp.sum(pair[1] * pair[1])) / layout.head_dim
        factor = jnp.where(by_kind(*normed), jax.lax.rsqrt(mean + eps), 1.0)
        scales = [by_kind(query, key, 1.0) for query, key in zip(query_scales, key_scales, strict=True)]
        pair = [rounded(x * factor * scale) for x, scale in zip(pair, scales, strict=True)]
    cos, sin = jnp.where(head < values, cos, 1.0), jnp.where(head < values, sin, 0.0)
    first, second = pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin

    def store(ref, *place, start=0, width=layout.head_dim, values=(first, second)):
        """Both halves of `width` numbers from `start` on; of narrower ones, the beginnings of the halves."""
        number = jnp.arange(half, dtype=jnp.int32)
        for index, part in enumerate(values):
            columns = start + index * (width // 2) + number
            where = ref.at[(*(jnp.full(half, each) for each in place), columns)]
            plt.store(where, part.astype(ref.dtype), mask=number < width // 2)

    if layout.heads:

        @pl.when(head < keys)
        def _() -> None:
            if layout.compact:
                stands = jnp.arange(half) >= layout.key_width // 2
                pairs = zip((first, second), key_scales, strict=True)
                meeting = [jnp.where(stands, x * weight, 0.0) for x, weight in pairs]
                store(queries_ref, slot, row, head, width=layout.key_width)
                store(queries_ref, slot, row, head, start=layout.key_width, values=meeting)
            else:
                store(queries_ref, slot, row, head)

    if stores:
        key_ref, value_ref = refs[-2:]

        @pl.when((head >= keys) & (head < values))
        def _() -> None:
            store(key_ref, target, head - keys, width=layout.key_width)

        @pl.when(head >= values)
        def _() -> None:
            store(value_ref, target, head - values)
