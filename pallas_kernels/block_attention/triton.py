"""Block attention as a Pallas Triton kernel.

One program works on one slot, one KV head and one tile of query rows; the heads that share the KV head stand below each
other in the tile, so that K and V are read once for all of them. It walks over the pages that its rows can see, in
blocks of keys at fixed absolute positions, with an online softmax in f32. Neighbouring rows are masked, never mixed in:
a row's bits do not depend on them.

    grid (slots, kv_heads, tiles)       q tile [rows * group, D] stays in registers
      for each block of keys            K block [BLOCK, D] -> scores -> running maximum and sum -> V block [BLOCK, D]
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

_KEY_BLOCK = 64
_TILE = 64
"""Query rows times heads of one program, at most; a power of two."""
_LEAST_TILE = 16
"""Tensor cores take 16 rows."""
_LOWEST = -1e30
"""Stands for minus infinity: a difference of two of them is a number."""


def block_attention(
    queries: Float[Array, "B T H D"],
    key_pool: Float[Array, "tokens kv_heads D"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.block_attention`. Raises NotImplementedError for sizes that are not powers of two."""
    batch, rows, heads, head_dim = queries.shape
    kv_heads = key_pool.shape[1]
    group = heads // kv_heads
    for name, size in (("head_dim", head_dim), ("page_size", page_size)):
        if size & (size - 1) or size < 16:
            raise NotImplementedError(f"block_attention on Triton takes powers of two from 16 on, got {name} {size}")
    tile = min(_TILE, max(_LEAST_TILE, pl.next_power_of_2(rows * group)))
    tiles = -(-rows * group // tile)
    stacked = queries.reshape(batch, rows, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    stacked = stacked.reshape(batch, kv_heads, rows * group, head_dim).astype(key_pool.dtype)
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, tiles * tile - rows * group), (0, 0)))
    key_block = min(_KEY_BLOCK, page_size)
    kernel = functools.partial(
        _kernel,
        rows=rows,
        group=group,
        tile=tile,
        key_block=key_block,
        page_size=page_size,
        num_pages=page_table.shape[1],
        scale=scale,
        window=window,
        causal=causal,
    )
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    tile_spec = pl.BlockSpec((None, None, tile, head_dim), lambda slot, head, index: (slot, head, index, 0))
    mixed = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, tiles),
        in_specs=[tile_spec, whole, whole, whole, whole],
        out_specs=tile_spec,
        out_shape=jax.ShapeDtypeStruct(stacked.shape, jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="block_attention",
    )(stacked, key_pool, value_pool, page_table, starts)
    mixed = mixed[:, :, : rows * group].reshape(batch, kv_heads, rows, group, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, rows, heads, head_dim).astype(queries.dtype)


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    out_ref,
    *,
    rows: int,
    group: int,
    tile: int,
    key_block: int,
    page_size: int,
    num_pages: int,
    scale: float,
    window: int | None,
    causal: bool,
) -> None:
    slot, head, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start = starts_ref[slot]
    query = query_ref[...]
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    row = jnp.minimum((index * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)) // group, rows - 1)
    token = start + row  # [tile, 1]
    last_token = start + jnp.minimum((index * tile + tile - 1) // group, rows - 1)
    first_token = start + index * tile // group
    last_seen = token if causal else jnp.full_like(token, start + rows - 1)
    end = (last_token if causal else start + rows - 1) // key_block + 1
    end = jnp.minimum(end, num_pages * (page_size // key_block))
    first_seen = 0 if window is None else jnp.maximum(first_token - (window - 1), 0)
    begin = jnp.int32(first_seen) // key_block

    def visit(block, state):
        highest, total, mixed = state
        place = block * key_block
        page = table_ref[slot, jax.lax.div(place, page_size)]
        at = pl.ds(page * page_size + jax.lax.rem(place, page_size), key_block)
        key = plt.load(key_ref.at[at, head, :])
        value = plt.load(value_ref.at[at, head, :])
        scores = plt.dot(query, key, trans_b=True, precision=precision) * scale  # [tile, key_block]
        key_token = place + jax.lax.broadcasted_iota(jnp.int32, (1, key_block), 1)
        seen = key_token <= last_seen
        if window is not None:
            seen &= token - key_token < window
        scores = jnp.where(seen, scores, _LOWEST)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_highest), 0.0)
        keep = jnp.exp(highest - new_highest)
        part = plt.dot(weights.astype(value.dtype), value, precision=precision)
        return new_highest, total * keep + jnp.sum(weights, axis=1, keepdims=True), mixed * keep + part

    state = (
        jnp.full((tile, 1), _LOWEST, jnp.float32),
        jnp.zeros((tile, 1), jnp.float32),
        jnp.zeros((tile, query.shape[1]), jnp.float32),
    )
    _, total, mixed = jax.lax.fori_loop(begin, end, visit, state)
    out_ref[...] = mixed / jnp.where(total == 0.0, 1.0, total)
