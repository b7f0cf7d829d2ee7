"""Block attention for chunks of a prompt as a Pallas Mosaic GPU kernel, for heads of 64 to 256 on Hopper cards.

It also takes the few rows of a drafter's layer without a window, which are not causal: all see the same keys.

A program takes 128 lines of one slot and KV head and reads all keys that they see, or a split's share of them where
such programs are too few for the card (chunk_tile.py has what it does).

    grid (tiles from the last rows on, kv_heads, slots * splits)

A line is a row of one head; a tile has the same rows of all heads of the group, one head behind the other. Where rows
do not divide into tiles, the last tile begins earlier: its first rows are computed twice, with the same bits. Lines
that belong to no row hold whatever was in memory, and nobody reads what comes of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.block_attention import chunk_tile
from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.block_attention.chunk_tile import HEAD_DIMS, TILE, Config, Work
from pallas_kernels.block_attention.combine import combine, splits_for
from pallas_kernels.block_attention.dealing import first_from, visits_before
from pallas_kernels.hopper import most_programs

LEAST_ROWS = 128
"""Of a chunk; steps and trees have fewer rows and other kernels, so that plain steps and blocks have the same bits.

Rows that are not causal are a drafter's: no plain step has them, and a draft may have any bits.
"""
_COST_OF_SPLIT = 0.04
"""Beside a wave of programs: sums that are written, read and put together."""
ROWS = 8
"""Shared memory is laid out in groups of so many lines; rows of a head are as many, or copies do not fit."""


def why_not(
    queries: Any,
    key_pool: Any,
    value_pool: Any,
    *,
    page_size: int,
    window: int | None,
    causal: bool,
    compact: bool,
    tree: bool,
) -> str | None:
    """What the kernel cannot take about these arguments, as the end of a sentence; None when it can."""
    rows, heads, head_dim = queries.shape[1:]
    group = heads // key_pool.shape[1]
    if head_dim not in HEAD_DIMS or compact:
        return f"takes heads of {HEAD_DIMS}, not compact, got {head_dim}, compact {compact}"
    if reason := hopper.why_not_pools(key_pool, value_pool):
        return reason
    if tree or not (causal or window is None):
        given = f"causal {causal}, window {window}, tree {tree}"
        return f"takes causal rows that form no tree, and others without a window, got {given}"
    if page_size % 64:
        return f"takes pages of a multiple of 64 tokens, got {page_size}"
    least = LEAST_ROWS if causal else ROWS
    if rows < least or rows % ROWS:
        return f"takes a multiple of {ROWS} rows from {least} on, got {rows}"
    if group * ROWS > TILE:
        return f"takes groups of {TILE // ROWS} heads at most, got {group}"
    return None


def config_for(head_dim: int, page_size: int) -> Config:
    """What was fastest on an H100; heads of 256 leave registers for 64 keys only."""
    key_block = 64 if head_dim == 256 or page_size % 128 else 128
    return Config(key_block, slots={64: 2, 128: 3, 256: 2}[head_dim])


def splits_of(programs: int, blocks: int, *, causal: bool = True) -> int:
    """What takes least: programs run in waves of one for each multiprocessor, and a half-empty wave takes as long.

    Rows that are not causal are few and wait for their keys: they have as many splits as one wave has room for. It
    follows from shapes alone, so that equal chunks are split alike.
    """
    at_once = most_programs()
    if not causal:
        return splits_for(at_once // programs, blocks)
    options = [splits for splits in (1, 2, 4) if splits <= max(1, blocks // 2)]
    return min(options, key=lambda splits: -(-programs * splits // at_once) / splits + _COST_OF_SPLIT * splits)


@functools.partial(
    jax.jit, static_argnames=("page_size", "scale", "window", "causal", "ring", "compact", "config", "interpret")
)
def block_attention(
    queries: Float[Array, "B T H D"],
    key_pool: Float[Array, "tokens kv_heads D"],
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
    """See `api.block_attention`. Raises NotImplementedError for what `why_not` names."""
    options = {"page_size": page_size, "window": window, "causal": causal, "compact": compact}
    if reason := why_not(queries, key_pool, value_pool, **options, tree=tree is not None):
        raise NotImplementedError(f"block_attention on Mosaic, for chunks, {reason}")
    batch, rows, heads, head_dim = queries.shape
    kv_heads = key_pool.shape[1]
    group = heads // kv_heads
    config = config or config_for(head_dim, page_size)
    tile_rows = min(TILE // group, rows) // ROWS * ROWS
    tiles = -(-rows // tile_rows)
    blocks = page_table.shape[1] * page_size // config.key_block
    splits = config.splits or splits_of(batch * kv_heads * tiles, blocks, causal=causal)
    kernel = functools.partial(
        _kernel,
        config=config,
        group=group,
        tile_rows=tile_rows,
        tiles=tiles,
        splits=splits,
        page_size=page_size,
        scale=scale,
        window=window,
        causal=causal,
        ring=ring,
        interpret=interpret,
    )
    results = chunk_tile.launch(
        kernel,
        queries,
        key_pool,
        value_pool,
        page_table,
        starts,
        config=config,
        tiles=tiles,
        heads=kv_heads,
        splits=splits,
        interpret=interpret,
    )
    if splits == 1:
        return results[0].astype(queries.dtype)

    def entry(row: Array, of_group: Array) -> Array:
        tile = row // tile_rows
        return tile * TILE + of_group * tile_rows + row - jnp.minimum(tile * tile_rows, rows - tile_rows)

    how = {"rows": rows, "group": group, "dtype": queries.dtype, "entry": entry, "interpret": interpret}
    return combine(*results, **how)


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    *refs,
    config: Config,
    group: int,
    tile_rows: int,
    tiles: int,
    splits: int,
    page_size: int,
    scale: float,
    window: int | None,
    causal: bool,
    ring: bool,
    interpret: bool,
) -> None:
    out_refs, memory = chunk_tile.results_and_memory(refs)
    key_block = config.key_block
    all_rows, pages = query_ref.shape[1], table_ref.shape[1]

    def work() -> Work:
        """The split's blocks begin with the first of its own that holds keys which rows of the tile see."""
        tile, head, slot, split = chunk_tile.place(tiles, splits)
        first_row = jnp.minimum(tile * tile_rows, all_rows - tile_rows)
        # The last keys that the tile's first and last row see: causal rows their own.
        of_first = starts_ref[slot] + (first_row if causal else all_rows - 1)
        of_last = of_first + (tile_rows - 1) if causal else of_first
        begin, end = jnp.int32(0), jax.lax.div(of_last, key_block) + 1
        all_from, all_to = begin, jax.lax.div(of_first + 1, key_block)
        if window is not None:
            begin = jax.lax.div(jnp.maximum(of_first - (window - 1), 0), key_block)
            all_from = jax.lax.div(jnp.maximum(of_last - (window - 1), 0) + (key_block - 1), key_block)
        if not ring:
            end = jnp.minimum(end, pages * (page_size // key_block))
        begin = first_from(begin, split, splits)

        def token_of(turn: Array) -> Array:
            return (begin + turn * splits) * key_block

        end, all_from, all_to = (visits_before(block, begin, splits) for block in (end, all_from, all_to))
        visits = jnp.maximum(end, 1)  # what begins with a block has one, even if no row sees it
        return Work(tile, head, head, slot, split, first_row, of_first, token_of, all_from, all_to, visits)

    chunk_tile.attend(
        work,
        query_ref,
        key_ref,
        value_ref,
        table_ref,
        out_refs,
        memory,
        config=config,
        group=group,
        tile_rows=tile_rows,
        splits=splits,
        page_size=page_size,
        scale=scale,
        window=window,
        causal=causal,
        ring=ring,
        interpret=interpret,
    )
