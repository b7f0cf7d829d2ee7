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

Rows of a tree have their ancestors at other places than a chain has its rows, and sums over other places have other
bits. So the splits that own blocks where the tree is stored (two, as a rule) have a program per row instead of one per
tile, which reads the row's ancestors in the order of a chain.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.ancestry import STEP_ROWS, Ancestry
from pallas_kernels.block_attention.combine import combine, splits_for
from pallas_kernels.online_softmax import LEAST_TILE, Sums, add_keys, no_sums, precision_of
from pallas_kernels.paged import pool_row, why_not
from pallas_kernels.tuning import tuned

TUNED = Path(__file__).with_name("tuned.json")
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
    tree: Ancestry | None = None,
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
    alike = rows if tree is None else STEP_ROWS
    config = config or config_for(alike * group, key_pool.shape[2], head_dim, key_pool.dtype.itemsize)
    tile = min(config.tile, max(LEAST_TILE, pl.next_power_of_2(alike * group)))
    tiles = -(-rows * group // tile)
    # f32 takes twice the shared memory of bf16.
    key_block = min(config.key_block * 2 // key_pool.dtype.itemsize, page_size)
    programs = batch * kv_heads * -(-alike * group // tile)
    splits = splits_for(config.programs // programs, page_table.shape[1] * page_size // key_block)
    kernel = functools.partial(
        _kernel if tree is None else _tree_kernel,
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
    mixed_spec = pl.BlockSpec(
        (None, None, None, tile, head_dim), lambda place, head, t: (place % splits, place // splits, head, t, 0)
    )
    grid, nodes = (batch * splits, kv_heads, tiles), ()
    if tree is not None:
        by_row = min(splits, -(-(rows - 1) // key_block) + 1) * rows * -(-group // tile)
        grid, nodes = (batch, kv_heads, splits * tiles + by_row), (tree.depths, tree.sees)
    mixed, highest, total = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * (5 + len(nodes)),
        out_specs=[mixed_spec, sums_spec, sums_spec] if tree is None else [whole] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="block_attention",
    )(queries.astype(key_pool.dtype), key_pool, value_pool, page_table, starts, *nodes)
    if splits > 1:
        return combine(mixed, highest, total, rows=rows, group=group, dtype=queries.dtype, interpret=interpret)
    mixed = mixed[0] / jnp.where(total == 0.0, 1.0, total)[0][..., None]
    mixed = mixed[:, :, : rows * group].reshape(batch, kv_heads, rows, group, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, rows, heads, head_dim).astype(queries.dtype)


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
    token = start + jnp.expand_dims(row, keys_axis)  # [tile, 1], or [1, tile] with the keys first
    last_token = start + jnp.minimum((index * tile + tile - 1) // group, rows - 1)
    first_token = start + index * tile // group
    last_seen = token if causal else jnp.full_like(token, start + rows - 1)
    end = (last_token if causal else start + rows - 1) // key_block + 1
    end = end if ring else jnp.minimum(end, num_pages * (page_size // key_block))
    first_seen = jnp.int32(0) if window is None else jnp.maximum(first_token - (window - 1), 0)
    begin, visits = _dealt(jax.lax.div(first_seen, key_block), end, split, splits)

    load = functools.partial(_load_block, key_ref, value_ref, table_ref, slot, head, key_block, page_size, ring)

    highest, total, mixed = _over_keys(
        (query, value_query),
        load,
        (begin, visits, splits),
        token=token,
        last_seen=last_seen,
        key_block=key_block,
        scale=scale,
        window=window,
        keys_axis=keys_axis,
    )
    mixed_ref[...] = mixed if keys_axis else mixed.T
    highest_ref[...] = highest.reshape(tile)
    total_ref[...] = total.reshape(tile)


def _from_block(number, split, splits: int):
    """The split's first block from this one on."""
    return number + jax.lax.rem(split + splits - jax.lax.rem(number, splits), splits)


def _dealt(first, end, split, splits: int):
    """Of the blocks `first..end`, the split's first one, and how many it has: it takes every `splits`-th."""
    begin = _from_block(first, split, splits)
    return begin, jax.lax.div(jnp.maximum(end - begin, 0) + splits - 1, splits)


def _load_block(
    key_ref, value_ref, table_ref, slot, head, key_block: int, page_size: int, ring: bool, place: Array
) -> tuple[Array, Array]:
    """K and V of the block of keys that begins at this token; a block lies in one page."""
    number = jax.lax.div(place, page_size)
    page = table_ref[slot, jax.lax.rem(number, table_ref.shape[1]) if ring else number]
    at = pl.ds(page * page_size + jax.lax.rem(place, page_size), key_block)
    return plt.load(key_ref.at[at, head, :]), plt.load(value_ref.at[at, head, :])


def _lines(query_ref, slot, of_line, first: int, width: int):
    """Numbers `first..` of the queries of some rows and heads; loads take slices only or arrays only."""
    shape = (of_line[0].shape[0], width)
    column = jnp.broadcast_to(first + jnp.arange(width, dtype=jnp.int32)[None, :], shape)
    row, head = (jnp.broadcast_to(each[:, None], shape) for each in of_line)
    return plt.load(query_ref.at[jnp.broadcast_to(slot, shape), row, head, column])


def _over_keys(
    queries: tuple[Array, Array | None],
    load: Callable[[Array], tuple[Array, Array]],
    blocks: tuple[Array, Array, int],
    *,
    token: Array,
    last_seen: Array,
    key_block: int,
    scale: float,
    window: int | None,
    keys_axis: int,
) -> Sums:
    """The sums of lines at these tokens over blocks of keys: first number, how many, step.

    `queries` meet keys and, in the compact form, values; `load` gives both for the block that begins at a token.
    """
    query, value_query = queries
    begin, visits, step = blocks
    precision = precision_of(query)
    tile, width = query.shape[0], query.shape[1] if value_query is None else value_query.shape[1]

    def meet(lines, keys):
        first, second = (lines, keys) if keys_axis else (keys, lines)
        return plt.dot(first, second, trans_b=True, precision=precision)

    def visit(turn, state):
        place = (begin + turn * step) * key_block
        key, value = load(place)
        scores = meet(query, key)  # [tile, key_block], or the keys first
        if value_query is not None:
            scores += meet(value_query, value)
        scores = scores * scale
        key_token = place + jnp.expand_dims(jnp.arange(key_block, dtype=jnp.int32), 1 - keys_axis)
        seen = key_token <= last_seen
        if window is not None:
            seen &= token - key_token < window
        return add_keys(state, scores, seen, value, keys_axis=keys_axis)

    return jax.lax.fori_loop(0, visits, visit, no_sums(tile, width, keys_axis=keys_axis))


def _tree_kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    depths_ref,
    sees_ref,
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
    """As `_kernel`, for rows of a tree; those are causal."""
    slot, head, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, tiles, parts = starts_ref[slot], -(-rows * group // tile), -(-group // tile)
    key_dim, width = key_ref.shape[2], value_ref.shape[2]
    first_seen = jnp.int32(0) if window is None else jnp.maximum(start - (window - 1), 0)
    first_block = jax.lax.div(first_seen, key_block)
    tree_block, last_block = jax.lax.div(start, key_block), jax.lax.div(start + rows - 1, key_block)

    def attend(split, row, of_group, depth, end, load, line, valid):
        """Stores the sums of lines (their rows, and heads of the group) over the split's blocks up to `end`."""
        of_line = (row, head * group + of_group)
        query = _lines(query_ref, slot, of_line, 0, key_dim)
        value_query = _lines(query_ref, slot, of_line, key_dim, width) if compact else None
        token = start + jnp.expand_dims(depth, keys_axis)
        begin, visits = _dealt(first_block, end, split, splits)
        highest, total, mixed = _over_keys(
            (query, value_query),
            load,
            (begin, visits, splits),
            token=token,
            last_seen=token,
            key_block=key_block,
            scale=scale,
            window=window,
            keys_axis=keys_axis,
        )
        where = [jnp.full_like(line, each) for each in (split, slot, head)]
        for ref, values in ((highest_ref, highest), (total_ref, total)):
            plt.store(ref.at[(*where, line)], values.reshape(tile), mask=valid)
        shape = (tile, width)
        where = [jnp.broadcast_to(each[:, None], shape) for each in (*where, line)]
        column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], shape)
        mask = jnp.broadcast_to(valid[:, None], shape)
        plt.store(mixed_ref.at[(*where, column)], mixed if keys_axis else mixed.T, mask=mask)

    split = jax.lax.div(index, tiles)

    @pl.when((split < splits) & (_from_block(tree_block, split, splits) > last_block))
    def _() -> None:
        """A tile of lines, in a split that has keys before the tree only."""
        line = jax.lax.rem(index, tiles) * tile + jnp.arange(tile, dtype=jnp.int32)
        inside = jnp.minimum(line, rows * group - 1)
        row = jax.lax.div(inside, group)
        depth = plt.load(depths_ref.at[jnp.full_like(row, slot), row])

        load = functools.partial(_load_block, key_ref, value_ref, table_ref, slot, head, key_block, page_size, ring)

        attend(split, row, jax.lax.rem(inside, group), depth, tree_block, load, line, line < rows * group)

    rest = index - splits * tiles
    block = tree_block + jax.lax.div(rest, rows * parts)

    @pl.when((rest >= 0) & (block <= last_block))
    def _() -> None:
        """One row's lines, in the split that owns this block of the tree."""
        node, part = jax.lax.div(jax.lax.rem(rest, rows * parts), parts), jax.lax.rem(rest, parts)
        number = part * tile + jnp.arange(tile, dtype=jnp.int32)
        of_group, row = jnp.minimum(number, group - 1), jnp.full_like(number, node)
        depth = plt.load(depths_ref.at[jnp.full_like(row, slot), row])
        others = jnp.arange(pl.next_power_of_2(rows), dtype=jnp.int32)
        seen = jax.lax.shift_right_logical(jnp.full_like(others, sees_ref[slot, node].astype(jnp.int32)), others) & 1
        inside = jnp.minimum(others, rows - 1)
        depths = jnp.where(seen == 1, plt.load(depths_ref.at[jnp.full_like(inside, slot), inside]), -1)

        def load(place):
            token = place + jnp.arange(key_block, dtype=jnp.int32)
            ancestor = depths[None, :] == (token - start)[:, None]
            stored = start + jnp.sum(jnp.where(ancestor, others[None, :], 0), axis=1)
            stored = jnp.where(token < start, token, stored)
            at = pool_row(table_ref, jnp.full_like(stored, slot), stored, page_size, ring)

            def gathered(ref):
                shape = (key_block, ref.shape[2])
                column = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
                return plt.load(ref.at[jnp.broadcast_to(at[:, None], shape), jnp.full(shape, head), column])

            return gathered(key_ref), gathered(value_ref)

        end = jax.lax.div(start + depths_ref[slot, node], key_block) + 1
        line = node * group + number
        attend(jax.lax.rem(block, splits), row, of_group, depth, end, load, line, number < group)
