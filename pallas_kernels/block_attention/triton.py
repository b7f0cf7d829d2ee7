"""Block attention as a Pallas Triton kernel.

One program works on one slot, one KV head, one tile of query rows and one share of the keys; the heads that share the
KV head stand below each other in the tile (row r of head g is line `r * group + g`), so that K and V are read once for
all of them. Blocks of keys lie at fixed absolute positions and are dealt out in turn: of S splits, split s takes blocks
s, s + S, s + 2 S ... that its rows can see, with an online softmax in f32. So all programs are busy whatever the length
of the context, and a row's sums do not depend on how far its neighbours reach. Neighbouring rows are masked, never
mixed in: a row's bits do not depend on them. combine.py puts the splits together, always in the same order. Being
jitted by itself, the kernel is lowered once for all layers of a shape.

    grid (slots * splits, kv_heads, tiles)   q tile [lines, D] stays in registers
      for each block of the split            K block [BLOCK, D] -> scores -> running maximum and sum -> V block
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.combine import combine
from pallas_kernels.online_softmax import LEAST_TILE, add_keys, no_sums, precision_of
from pallas_kernels.paged import why_not
from pallas_kernels.tuning import tuned

TUNED = Path(__file__).with_name("tuned.json")
_MOST_SPLITS = 64
"""Splits that are worth putting together."""
CHUNK = 128
"""From so many lines per KV head on it is a chunk of a prompt, and not a step."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How attention is cut into programs.

    tile        lines of a program, at most; a power of two
    key_block   keys that it looks at together
    programs    to aim at, by splitting the keys: some for each of 132 multiprocessors
    keys_first  scores are [keys, lines]: a Hopper card multiplies at least 64 rows at a time, and then reads K and V
                from shared memory once for all lines
    """

    tile: int
    key_block: int
    warps: int = 4
    stages: int = 2
    programs: int = 264
    keys_first: bool = False


def key(lines: int, key_dim: int, head_dim: int) -> str:
    """What tuned.json calls a shape."""
    compact = f", keys of {key_dim}" if key_dim < head_dim else ""
    return f"{'chunk' if lines > CHUNK else 'step'}, heads of {head_dim}{compact}"


def config_for(lines: int, key_dim: int, head_dim: int, itemsize: int = 2) -> Config:
    """That of tuned.json for this device and shape, or one that fits registers and shared memory.

    Sweeps are of bf16: what fits then does not in f32.
    """
    known = tuned(TUNED, key(lines, key_dim, head_dim)) if itemsize == 2 else None
    return Config(**known) if known else rule(lines, head_dim)


def rule(lines: int, head_dim: int) -> Config:
    """A config for devices without a sweep: the tile's sums fit registers, what a step reads fits shared memory."""
    if head_dim > 256:
        return Config(64, 32, warps=8, stages=3) if lines > CHUNK else Config(32, 32)
    if head_dim > 128:
        return Config(128, 64, warps=8, stages=3) if lines > CHUNK else Config(32, 32)
    if head_dim > 64 or lines > CHUNK:
        return Config(64, 64)
    return Config(16, 64, programs=528)


@functools.partial(
    jax.jit, static_argnames=("page_size", "scale", "window", "causal", "ring", "compact", "config", "interpret")
)
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
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.block_attention`. Raises NotImplementedError for sizes that are not powers of two."""
    batch, rows, heads, _ = queries.shape
    kv_heads, head_dim = value_pool.shape[1:]
    group = heads // kv_heads
    if reason := why_not(page_size, key_pool.shape[2], head_dim):
        raise NotImplementedError(f"block_attention on Triton {reason}")
    config = config or config_for(rows * group, key_pool.shape[2], head_dim, key_pool.dtype.itemsize)
    tile = min(config.tile, max(LEAST_TILE, pl.next_power_of_2(rows * group)))
    tiles = -(-rows * group // tile)
    # f32 takes twice the shared memory of bf16.
    key_block = min(config.key_block * 2 // key_pool.dtype.itemsize, page_size)
    splits = _splits(config.programs // (batch * kv_heads * tiles), page_table.shape[1] * page_size // key_block)
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
        keys_axis=0 if config.keys_first else 1,
    )
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    shape = (splits, batch, kv_heads, tiles * tile)
    sums_spec = pl.BlockSpec(
        (None, None, None, tile), lambda place, head, t: (place % splits, place // splits, head, t)
    )
    mixed, highest, total = pl.pallas_call(
        kernel,
        grid=(batch * splits, kv_heads, tiles),
        in_specs=[whole] * 5,
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
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="block_attention",
    )(queries.astype(key_pool.dtype), key_pool, value_pool, page_table, starts)
    if splits > 1:
        return combine(mixed, highest, total, rows=rows, group=group, dtype=queries.dtype, interpret=interpret)
    mixed = mixed[0] / jnp.where(total == 0.0, 1.0, total)[0][..., None]
    mixed = mixed[:, :, : rows * group].reshape(batch, kv_heads, rows, group, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, rows, heads, head_dim).astype(queries.dtype)


def _splits(most: int, key_blocks: int) -> int:
    """A power of two; it follows from shapes alone, so that the same row is always split alike."""
    wanted = min(_MOST_SPLITS, max(1, most), max(1, key_blocks // 2))
    return 1 << (wanted.bit_length() - 1)


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    mixed_ref,
    highest_ref,
    total_ref,
    *,
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
    keys_axis: int,
) -> None:
    place, head, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slot, split = jax.lax.div(place, splits), jax.lax.rem(place, splits)
    start = starts_ref[slot]
    line = jnp.minimum(index * tile + jnp.arange(tile, dtype=jnp.int32), rows * group - 1)
    row = jax.lax.div(line, group)
    of_line = (row, head * group + jax.lax.rem(line, group))
    key_dim = key_ref.shape[2]
    query = _lines(query_ref, slot, of_line, 0, key_dim)
    value_query = _lines(query_ref, slot, of_line, key_dim, value_ref.shape[2]) if compact else None
    precision = precision_of(query)
    token = start + jnp.expand_dims(row, keys_axis)  # [tile, 1], or [1, tile] with the keys first
    last_token = start + jnp.minimum((index * tile + tile - 1) // group, rows - 1)
    first_token = start + index * tile // group
    last_seen = token if causal else jnp.full_like(token, start + rows - 1)
    end = (last_token if causal else start + rows - 1) // key_block + 1
    end = end if ring else jnp.minimum(end, num_pages * (page_size // key_block))
    first_seen = jnp.int32(0) if window is None else jnp.maximum(first_token - (window - 1), 0)
    begin = jax.lax.div(first_seen, key_block)
    begin = begin + jax.lax.rem(split + splits - jax.lax.rem(begin, splits), splits)  # the split's first one from there
    visits = jax.lax.div(jnp.maximum(end - begin, 0) + splits - 1, splits)

    def meet(lines, keys):
        first, second = (lines, keys) if keys_axis else (keys, lines)
        return plt.dot(first, second, trans_b=True, precision=precision)

    def visit(turn, state):
        place = (begin + turn * splits) * key_block
        number = jax.lax.div(place, page_size)
        page = table_ref[slot, jax.lax.rem(number, num_pages) if ring else number]
        at = pl.ds(page * page_size + jax.lax.rem(place, page_size), key_block)
        key = plt.load(key_ref.at[at, head, :])
        value = plt.load(value_ref.at[at, head, :])
        scores = meet(query, key)  # [tile, key_block], or the keys first
        if value_query is not None:
            scores += meet(value_query, value)
        scores = scores * scale
        key_token = place + jnp.expand_dims(jnp.arange(key_block, dtype=jnp.int32), 1 - keys_axis)
        seen = key_token <= last_seen
        if window is not None:
            seen &= token - key_token < window
        return add_keys(state, scores, seen, value, keys_axis=keys_axis)

    nothing = no_sums(tile, mixed_ref.shape[-1], keys_axis=keys_axis)
    highest, total, mixed = jax.lax.fori_loop(0, visits, visit, nothing)
    mixed_ref[...] = mixed if keys_axis else mixed.T
    highest_ref[...] = highest.reshape(tile)
    total_ref[...] = total.reshape(tile)


def _lines(query_ref, slot, of_line, first: int, width: int):
    """Numbers `first..` of the queries of some rows and heads; loads take slices only or arrays only."""
    shape = (of_line[0].shape[0], width)
    column = jnp.broadcast_to(first + jnp.arange(width, dtype=jnp.int32)[None, :], shape)
    row, head = (jnp.broadcast_to(each[:, None], shape) for each in of_line)
    return plt.load(query_ref.at[jnp.broadcast_to(slot, shape), row, head, column])
