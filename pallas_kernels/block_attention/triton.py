"""Block attention as a Pallas Triton kernel.

One program works on one slot, one KV head, one tile of query rows and one share of the keys; the heads that share the
KV head stand below each other in the tile, so that K and V are read once for all of them. Blocks of keys lie at fixed
absolute positions and are dealt out in turn: of S splits, split s takes blocks s, s + S, s + 2 S ... that its rows can
see, with an online softmax in f32. So all programs are busy whatever the length of the context, and a row's sums do not
depend on how far its neighbours reach. Neighbouring rows are masked, never mixed in: a row's bits do not depend on
them. combine.py puts the splits together, always in the same order. Being jitted by itself, the kernel is lowered once
for all layers of a shape.

    grid (slots * splits, kv_heads, tiles)   q tile [rows * group, D] stays in registers
      for each block of the split            K block [BLOCK, D] -> scores -> running maximum and sum -> V block
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.combine import combine
from pallas_kernels.online_softmax import LEAST_TILE, TILE_NUMBERS, add_keys, no_sums, precision_of, step_size
from pallas_kernels.paged import why_not

_KEY_BLOCK = 64
_TILE = 64
"""Query rows times heads of one program, at most; a power of two."""
_PROGRAMS, _MOST_SPLITS = 264, 64
"""Programs to aim at (two for each of an H100's 132 multiprocessors), and splits that are worth putting together."""


@functools.partial(jax.jit, static_argnames=("page_size", "scale", "window", "causal", "ring", "compact", "interpret"))
def block_attention(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    ring: bool = False,
    compact: bool = False,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.block_attention`. Raises NotImplementedError for sizes that are not powers of two."""
    batch, rows, heads, width = queries.shape
    kv_heads, head_dim = value_pool.shape[1:]
    group = heads // kv_heads
    if reason := why_not(page_size, key_pool.shape[2], head_dim):
        raise NotImplementedError(f"block_attention on Triton {reason}")
    most = min(_TILE, max(LEAST_TILE, TILE_NUMBERS // head_dim))
    tile = min(most, max(LEAST_TILE, pl.next_power_of_2(rows * group)))
    tiles = -(-rows * group // tile)
    key_block = step_size(min(_KEY_BLOCK, page_size), key_pool.shape[2] + head_dim, key_pool.dtype)
    splits = _splits(batch * kv_heads * tiles, page_table.shape[1] * page_size // key_block)
    stacked = queries.reshape(batch, rows, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    stacked = stacked.reshape(batch, kv_heads, rows * group, width).astype(key_pool.dtype)
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, tiles * tile - rows * group), (0, 0)))
    # The kernel takes powers of two, so what meets the keys and what meets the values come apart.
    parts = jnp.split(stacked, [key_pool.shape[2]], axis=-1) if compact else [stacked]
    kernel = functools.partial(
        _kernel,
        rows=rows,
        group=group,
        tile=tile,
        splits=splits,
        key_block=key_block,
        page_size=page_size,
        num_pages=page_table.shape[1],
        scale=scale,
        window=window,
        causal=causal,
        ring=ring,
        compact=compact,
    )
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    shape = (splits, batch, kv_heads, tiles * tile)
    sums_spec = pl.BlockSpec(
        (None, None, None, tile), lambda place, head, t: (place % splits, place // splits, head, t)
    )
    mixed, highest, total = pl.pallas_call(
        kernel,
        grid=(batch * splits, kv_heads, tiles),
        in_specs=[
            *[
                pl.BlockSpec((None, None, tile, part.shape[3]), lambda place, head, t: (place // splits, head, t, 0))
                for part in parts
            ],
            *[whole] * 4,
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, tile, head_dim), lambda place, head, t: (place % splits, place // splits, head, t, 0)
            ),
            sums_spec,
            sums_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=8 if head_dim > 256 else 4, num_stages=2),
        interpret=interpret,
        name="block_attention",
    )(*parts, key_pool, value_pool, page_table, starts)
    if splits > 1:
        return combine(mixed, highest, total, rows=rows, group=group, dtype=queries.dtype, interpret=interpret)
    mixed = mixed[0] / jnp.where(total == 0.0, 1.0, total)[0][..., None]
    mixed = mixed[:, :, : rows * group].reshape(batch, kv_heads, rows, group, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, rows, heads, head_dim).astype(queries.dtype)


def _splits(programs: int, key_blocks: int) -> int:
    """A power of two; it follows from shapes alone, so that the same row is always split alike."""
    wanted = min(_MOST_SPLITS, max(1, _PROGRAMS // programs), max(1, key_blocks // 2))
    return 1 << (wanted.bit_length() - 1)


def _kernel(
    *refs,
    rows: int,
    group: int,
    tile: int,
    splits: int,
    key_block: int,
    page_size: int,
    num_pages: int,
    scale: float,
    window: int | None,
    causal: bool,
    ring: bool,
    compact: bool,
) -> None:
    *query_refs, key_ref, value_ref, table_ref, starts_ref, mixed_ref, highest_ref, total_ref = refs
    place, head, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slot, split = jax.lax.div(place, splits), jax.lax.rem(place, splits)
    start = starts_ref[slot]
    query, *value_query = [ref[...] for ref in query_refs]
    precision = precision_of(query)
    row = jnp.minimum((index * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)) // group, rows - 1)
    token = start + row  # [tile, 1]
    last_token = start + jnp.minimum((index * tile + tile - 1) // group, rows - 1)
    first_token = start + index * tile // group
    last_seen = token if causal else jnp.full_like(token, start + rows - 1)
    end = (last_token if causal else start + rows - 1) // key_block + 1
    end = end if ring else jnp.minimum(end, num_pages * (page_size // key_block))
    first_seen = jnp.int32(0) if window is None else jnp.maximum(first_token - (window - 1), 0)
    begin = jax.lax.div(first_seen, key_block)
    begin = begin + jax.lax.rem(split + splits - jax.lax.rem(begin, splits), splits)  # the split's first one from there
    visits = jax.lax.div(jnp.maximum(end - begin, 0) + splits - 1, splits)

    def visit(turn, state):
        place = (begin + turn * splits) * key_block
        number = jax.lax.div(place, page_size)
        page = table_ref[slot, jax.lax.rem(number, num_pages) if ring else number]
        at = pl.ds(page * page_size + jax.lax.rem(place, page_size), key_block)
        key = plt.load(key_ref.at[at, head, :])
        value = plt.load(value_ref.at[at, head, :])
        scores = plt.dot(query, key, trans_b=True, precision=precision)  # [tile, key_block]
        if compact:
            scores += plt.dot(value_query[0], value, trans_b=True, precision=precision)
        scores = scores * scale
        key_token = place + jax.lax.broadcasted_iota(jnp.int32, (1, key_block), 1)
        seen = key_token <= last_seen
        if window is not None:
            seen &= token - key_token < window
        return add_keys(state, scores, seen, value)

    highest, total, mixed = jax.lax.fori_loop(0, visits, visit, no_sums(tile, mixed_ref.shape[-1]))
    mixed_ref[...] = mixed
    highest_ref[...] = highest[:, 0]
    total_ref[...] = total[:, 0]
