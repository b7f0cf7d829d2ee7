"""Sparse attention as three Pallas Triton kernels: two select, one attends.

Weighing takes the logarithm of a block's mass for a query block and head: a log-sum-exp over rows of its mean's scores.
Programs share no sums, so there are as many as there are tiles of means.

    grid (tiles of means, slots * query blocks, heads)   means [MEANS, D]
      for each tile of the query block [TILE, D]         scores -> running maximum and sum of each mean

Listing compares masses with the largest one. What it keeps it writes one behind the other, by a running sum.

    grid (slots * query blocks, heads)
      for each tile of masses [LISTED]                   largest mass
      for each tile of masses                            kept? -> numbers of blocks, count

The attending program works on a query block and one head. It reads the blocks that are listed, with an online softmax
in f32. Programs of the last rows come first: they have most to read.

    grid (slots * query blocks * tiles, heads)           q tile [TILE, D] stays in registers
      for each listed block, in parts                    K part [KEYS, D] -> scores -> running maximum and sum -> V part
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.online_softmax import LEAST_TILE, LOWEST, TILE_NUMBERS, add_keys, no_sums, precision_of, step_size
from pallas_kernels.paged import why_not
from pallas_kernels.sparse_attention.selection import (
    Selection,
    SelectionRule,
    in_query_blocks,
    in_rows,
    query_block_rows,
)

_KEYS = 64
"""Keys of one step of the loops, at most."""


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """How selecting is cut: means of a program that weighs, and masses that a step lists, at most."""

    means: int = 64
    listed: int = 1024


@functools.partial(jax.jit, static_argnames=("scale", "rule", "key_dim", "config", "interpret"))
def select_blocks(
    queries: Float[Array, "B T H Q"],
    means: Float[Array, "B N kv_heads Q"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    rule: SelectionRule,
    key_dim: int | None = None,
    config: SelectConfig = SelectConfig(),
    interpret: bool = False,
) -> Selection:
    """See `api.select_blocks`. `key_dim` cuts compact queries, which are no power of two wide, into two that are.

    Raises NotImplementedError for sizes that are not powers of two.
    """
    slots, rows, heads, width = queries.shape
    num_blocks, kv_heads = means.shape[1:3]
    cuts = [] if key_dim is None else [key_dim]
    widths = [key_dim, width - key_dim] if key_dim is not None else [width]
    if reason := why_not(rule.block_size, *widths):
        raise NotImplementedError(f"select_blocks on Triton {reason}")
    size, blocks = query_block_rows(rows, rule.block_size)
    tile, padded = _tiles(size, max(widths))
    # In query blocks but not by head: a program reads the rows of its head where they lie.
    queries = jnp.pad(queries.astype(means.dtype), ((0, 0), (0, blocks * size - rows), (0, 0), (0, 0)))
    queries = queries.reshape(slots, blocks, size, heads, width)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padded - size), (0, 0), (0, 0)))
    step_means = step_size(config.means, width, means.dtype)
    means = jnp.pad(means, ((0, 0), (0, -num_blocks % step_means), (0, 0), (0, 0)))
    listed = max(step_means, min(config.listed, pl.next_power_of_2(num_blocks)))
    places = -(-num_blocks // listed) * listed
    query_parts, mean_parts = jnp.split(queries, cuts, axis=-1), jnp.split(means, cuts, axis=-1)
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    shared = {"rows": rows, "size": size, "blocks": blocks, "num_blocks": num_blocks, "rule": rule}

    def of_block(part: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, padded, None, part.shape[4]),
            lambda _, place, head: (place // blocks, place % blocks, 0, head, 0),
        )

    masses = pl.pallas_call(
        functools.partial(
            _weigh_kernel,
            tile=tile,
            tiles=padded // tile,
            step_means=step_means,
            group=heads // kv_heads,
            scale=scale,
            **shared,
        ),
        grid=(means.shape[1] // step_means, slots * blocks, heads),
        in_specs=[*map(of_block, query_parts), *[whole] * (len(mean_parts) + 2)],
        out_specs=pl.BlockSpec(
            (None, None, None, step_means),
            lambda step, place, head: (place // blocks, place % blocks, head, step),
        ),
        out_shape=jax.ShapeDtypeStruct((slots, blocks, heads, places), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=_warps_of(step_means, width), num_stages=2),
        interpret=interpret,
        name="sparse_attention_weigh",
    )(*query_parts, *mean_parts, starts, lengths)

    def of_list(entries: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, entries), lambda place, head: (place // blocks, place % blocks, head, 0))

    indices, counts = pl.pallas_call(
        functools.partial(_list_kernel, places=places, listed=listed, **shared),
        grid=(slots * blocks, heads),
        in_specs=[of_list(places), whole, whole],
        out_specs=[of_list(places), of_list(1)],
        out_shape=[
            jax.ShapeDtypeStruct((slots, blocks, heads, places), jnp.int32),
            jax.ShapeDtypeStruct((slots, blocks, heads, 1), jnp.int32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="sparse_attention_list",
    )(masses, starts, lengths)
    return Selection(indices[..., :num_blocks], counts[..., 0])


@functools.partial(jax.jit, static_argnames=("page_size", "scale", "block_size", "compact", "interpret"))
def attend_blocks(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    selection: Selection,
    *,
    page_size: int,
    scale: float,
    block_size: int,
    compact: bool = False,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.attend_blocks`. Raises NotImplementedError for sizes that are not powers of two."""
    slots, rows, heads, _ = queries.shape
    kv_heads, head_dim = value_pool.shape[1:]
    if reason := why_not(page_size, block_size, key_pool.shape[2], head_dim):
        raise NotImplementedError(f"attend_blocks on Triton {reason}")
    size, blocks = query_block_rows(rows, block_size)
    tile, padded = _tiles(size, head_dim)
    tiles = padded // tile
    stacked = in_query_blocks(queries.astype(key_pool.dtype), size, blocks, padded)
    parts = jnp.split(stacked, [key_pool.shape[2]], axis=-1) if compact else [stacked]
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    programs = slots * blocks * tiles

    def of_tile(width: int) -> pl.BlockSpec:
        def index(turn: Array, head: Array) -> tuple[Array | int, ...]:
            place = programs - 1 - turn
            return place // tiles // blocks, place // tiles % blocks, head, place % tiles, 0

        return pl.BlockSpec((None, None, None, tile, width), index)

    mixed = pl.pallas_call(
        functools.partial(
            _attend_kernel,
            size=size,
            blocks=blocks,
            tile=tile,
            tiles=tiles,
            programs=programs,
            group=heads // kv_heads,
            page_size=page_size,
            block_size=block_size,
            part=step_size(min(_KEYS, block_size), key_pool.shape[2] + head_dim, key_pool.dtype),
            scale=scale,
            compact=compact,
        ),
        grid=(programs, heads),
        in_specs=[*[of_tile(part.shape[4]) for part in parts], *[whole] * 6],
        out_specs=of_tile(head_dim),
        out_shape=jax.ShapeDtypeStruct((slots, blocks, heads, padded, head_dim), queries.dtype),
        compiler_params=plt.CompilerParams(num_warps=_warps_of(tile, head_dim), num_stages=2),
        interpret=interpret,
        name="sparse_attention_attend",
    )(*parts, key_pool, value_pool, page_table, starts, selection.indices, selection.counts)
    return in_rows(mixed, size, rows)


def _tiles(size: int, width: int) -> tuple[int, int]:
    """Rows of a tile of a query block, and rows of the whole block in full tiles."""
    tile = min(max(LEAST_TILE, pl.next_power_of_2(size)), max(LEAST_TILE, TILE_NUMBERS // width))
    return tile, -(-size // tile) * tile


def _warps_of(lines: int, width: int) -> int:
    return 8 if lines * width >= TILE_NUMBERS else 4


class _Seen(NamedTuple):
    """Token indices of a query block's first and last row, its prompt's length, and how many blocks it sees some of."""

    first: Array
    last: Array
    length: Array
    end: Array


def _seen(
    starts_ref, lengths_ref, place: Array, *, rows: int, size: int, blocks: int, num_blocks: int, block_size: int
) -> _Seen:
    slot = jax.lax.div(place, blocks)
    start, length = starts_ref[slot], lengths_ref[slot]
    first = start + jax.lax.rem(place, blocks) * size
    last = jnp.minimum(jnp.minimum(first + size, start + rows), length) - 1
    end = jnp.minimum(jax.lax.div(last, block_size) + 1, num_blocks)
    return _Seen(first, last, length, jnp.where(first < length, end, 0))


def _weigh_kernel(
    *refs,
    rows: int,
    size: int,
    blocks: int,
    num_blocks: int,
    rule: SelectionRule,
    tile: int,
    tiles: int,
    step_means: int,
    group: int,
    scale: float,
) -> None:
    *both, starts_ref, lengths_ref, masses_ref = refs
    query_refs, mean_refs = both[: len(both) // 2], both[len(both) // 2 :]
    step, place, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    slot, kv_head = jax.lax.div(place, blocks), jax.lax.div(head, group)
    sizes = {"rows": rows, "size": size, "blocks": blocks, "num_blocks": num_blocks, "block_size": rule.block_size}
    first, last, _, end = _seen(starts_ref, lengths_ref, place, **sizes)
    number = step * step_means + jax.lax.broadcasted_iota(jnp.int32, (step_means, 1), 0)
    means = [plt.load(ref.at[slot, pl.ds(step * step_means, step_means), kv_head, :]) for ref in mean_refs]

    def add(index, state):
        highest, total = state
        scores = jnp.zeros((step_means, tile), jnp.float32)
        for query_ref, mean in zip(query_refs, means, strict=True):
            query = plt.load(query_ref.at[pl.ds(index * tile, tile), :])
            scores += plt.dot(mean, query, trans_b=True, precision=precision_of(query))
        token = first + index * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
        seen = (number * rule.block_size <= token) & (token <= last)
        scores = jnp.where(seen, scores * scale, LOWEST)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
        part = jnp.sum(jnp.where(seen, jnp.exp(scores - new_highest[:, None]), 0.0), axis=1)
        return new_highest, total * jnp.exp(highest - new_highest) + part

    state = (jnp.full((step_means,), LOWEST, jnp.float32), jnp.zeros((step_means,), jnp.float32))
    here = jnp.where(step * step_means < end, jnp.int32(tiles), jnp.int32(0))  # nothing is read where nothing is seen
    highest, total = jax.lax.fori_loop(0, here, add, state)
    masses_ref[...] = jnp.where(total > 0.0, highest + jnp.log(total), LOWEST)


def _list_kernel(
    masses_ref,
    starts_ref,
    lengths_ref,
    indices_ref,
    counts_ref,
    *,
    rows: int,
    size: int,
    blocks: int,
    num_blocks: int,
    rule: SelectionRule,
    places: int,
    listed: int,
) -> None:
    sizes = {"rows": rows, "size": size, "blocks": blocks, "num_blocks": num_blocks, "block_size": rule.block_size}
    first, _, length, end = _seen(starts_ref, lengths_ref, pl.program_id(0), **sizes)
    near = jax.lax.div(first, rule.block_size) - rule.window
    whole = first >= length - rule.full * rule.block_size
    steps = jax.lax.div(end + listed - 1, listed)

    def numbers(step):
        return step * listed + jax.lax.broadcasted_iota(jnp.int32, (listed,), 0)

    def masses(step):
        return jnp.where(numbers(step) < end, plt.load(masses_ref.at[pl.ds(step * listed, listed)]), LOWEST)

    def find_largest(step, largest):
        return jnp.maximum(largest, jnp.max(masses(step)))

    largest = jax.lax.fori_loop(0, steps, find_largest, jnp.float32(LOWEST))

    def keep(step, count):
        number = numbers(step)
        heavy = jnp.exp(masses(step) - largest) >= rule.alpha
        kept = (heavy | (number < rule.sink) | (number > near) | whole) & (number < end)
        before = count + jnp.cumsum(kept.astype(jnp.int32), axis=0)  # with itself
        # Every block has a place of its own, from the end if it is dropped: the interpreter writes to masked ones too.
        at = jnp.where(kept, before - 1, places - 1 - (number - before))
        plt.store(indices_ref.at[at], number, mask=kept)
        return count + jnp.sum(kept.astype(jnp.int32))

    counts_ref[...] = jnp.full((1,), jax.lax.fori_loop(0, steps, keep, jnp.int32(0)), jnp.int32)


def _attend_kernel(
    *refs,
    size: int,
    blocks: int,
    tile: int,
    tiles: int,
    programs: int,
    group: int,
    page_size: int,
    block_size: int,
    part: int,
    scale: float,
    compact: bool,
) -> None:
    *query_refs, key_ref, value_ref, table_ref, starts_ref, indices_ref, counts_ref, out_ref = refs
    place, head = programs - 1 - pl.program_id(0), pl.program_id(1)
    whole_block = jax.lax.div(place, tiles)
    slot, number = jax.lax.div(whole_block, blocks), jax.lax.rem(whole_block, blocks)
    kv_head = jax.lax.div(head, group)
    query, *value_query = [ref[...] for ref in query_refs]
    precision = precision_of(query)
    row = number * size + jax.lax.rem(place, tiles) * tile
    token = starts_ref[slot] + row + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    parts = block_size // part
    turns = counts_ref[slot, number, head] * parts

    def visit(turn, state):
        block = indices_ref[slot, number, head, jax.lax.div(turn, parts)]
        key_token = block * block_size + jax.lax.rem(turn, parts) * part
        page = table_ref[slot, jax.lax.div(key_token, page_size)]
        at = pl.ds(page * page_size + jax.lax.rem(key_token, page_size), part)
        key = plt.load(key_ref.at[at, kv_head, :])
        value = plt.load(value_ref.at[at, kv_head, :])
        scores = plt.dot(query, key, trans_b=True, precision=precision)  # [tile, part]
        if compact:
            scores += plt.dot(value_query[0], value, trans_b=True, precision=precision)
        seen = key_token + jax.lax.broadcasted_iota(jnp.int32, (1, part), 1) <= token
        return add_keys(state, scores * scale, seen, value)

    _, total, mixed = jax.lax.fori_loop(0, turns, visit, no_sums(tile, out_ref.shape[-1]))
    out_ref[...] = (mixed / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype)
