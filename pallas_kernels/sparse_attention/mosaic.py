"""The attending half of sparse attention as a Pallas Mosaic GPU kernel, for heads of 64 to 256 on Hopper cards.

A program takes the rows of a query block and one head, which are a tile of 128 lines, and reads the blocks that are
listed for them, or every so many of them where such programs are too few for the card. What it does with a tile it
shares with dense attention of chunks (block_attention/chunk_tile.py).

    grid (query blocks from the last one on, heads, slots * splits)

The last rows come first: they read everything. Lists ascend and hold no block that begins behind the query block's last
row, so only the last two blocks of a list may hold keys that a row does not see.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.block_attention import chunk_tile
from pallas_kernels.block_attention.chunk_tile import HEAD_DIMS, TILE, Config, Work
from pallas_kernels.block_attention.combine import combine
from pallas_kernels.block_attention.dealing import visits_before
from pallas_kernels.hopper import most_programs
from pallas_kernels.sparse_attention.selection import Selection, query_block_rows

_AT_EDGE = 2
"""Blocks at the end of a list: as many as a query block's own keys may lie in."""
_BEHIND_ALL = 1 << 23
"""A block of keys that no row sees."""


def config_for(head_dim: int) -> Config:
    """What was fastest on an H100: memory decides, and two slots are enough."""
    return Config(64 if head_dim == 256 else 128, slots=2)


def why_not(key_pool: Any, value_pool: Any, *, block_size: int, compact: bool) -> str | None:
    """What the kernel cannot take about these arguments, as the end of a sentence; None when it can."""
    head_dim = value_pool.shape[2]
    if head_dim not in HEAD_DIMS or compact:
        return f"takes heads of {HEAD_DIMS}, not compact, got {head_dim}, compact {compact}"
    if key_pool.shape[2] != head_dim:
        return f"takes keys as wide as values, got {key_pool.shape[2]} and {head_dim}"
    if block_size != TILE:
        return f"takes blocks of {TILE} rows and keys, got {block_size}"
    return hopper.why_not_pools(key_pool, value_pool)


def splits_of(programs: int, blocks: int) -> int:
    """What one wave of programs has room for: lists are short as a rule, so that a split is to cost nothing else.

    It follows from shapes alone, so that equal chunks are split alike.
    """
    options = [splits for splits in (1, 2, 4) if splits <= max(1, blocks // 2)]
    return max(splits for splits in options if splits == 1 or splits * programs <= most_programs())


@functools.partial(jax.jit, static_argnames=("page_size", "scale", "block_size", "compact", "config", "interpret"))
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
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.attend_blocks`. Raises NotImplementedError for what `why_not` names."""
    if reason := why_not(key_pool, value_pool, block_size=block_size, compact=compact):
        raise NotImplementedError(f"attend_blocks on Mosaic {reason}")
    batch, rows, heads, head_dim = queries.shape
    config = config or config_for(head_dim)
    _, tiles = query_block_rows(rows, block_size)
    splits = config.splits or splits_of(batch * heads * tiles, page_table.shape[1] * page_size // block_size)
    kernel = functools.partial(
        _kernel,
        config=config,
        group=heads // key_pool.shape[1],
        tiles=tiles,
        splits=splits,
        page_size=page_size,
        scale=scale,
        interpret=interpret,
    )
    results = chunk_tile.launch(
        kernel,
        jnp.pad(queries, ((0, 0), (0, tiles * TILE - rows), (0, 0), (0, 0))),
        key_pool,
        value_pool,
        page_table,
        starts,
        selection.indices,
        selection.counts,
        config=config,
        tiles=tiles,
        heads=heads,
        splits=splits,
        interpret=interpret,
    )
    if splits == 1:
        return results[0][:, :rows].astype(queries.dtype)
    return combine(*results, rows=rows, group=1, dtype=queries.dtype, interpret=interpret)


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    indices_ref,
    counts_ref,
    *refs,
    config: Config,
    group: int,
    tiles: int,
    splits: int,
    page_size: int,
    scale: float,
    interpret: bool,
) -> None:
    out_refs, memory = chunk_tile.results_and_memory(refs)
    parts = TILE // config.key_block

    def work() -> Work:
        tile, head, slot, split = chunk_tile.place(tiles, splits)
        first_row = tile * TILE
        listed = counts_ref[slot, tile, head] * parts

        def token_of(turn: Array) -> Array:
            number = split + turn * splits
            block = indices_ref[slot, tile, head, jax.lax.div(number, parts)]
            block = jnp.where(number < listed, block, _BEHIND_ALL)
            return block * TILE + jax.lax.rem(number, parts) * config.key_block

        return Work(
            tile=tile,
            head=head,
            kv_head=jax.lax.div(head, group),
            slot=slot,
            split=split,
            first_row=first_row,
            last_seen=starts_ref[slot] + first_row,
            token_of=token_of,
            all_from=jnp.int32(0),
            all_to=visits_before(listed - _AT_EDGE * parts, split, splits),
            # Where nothing is listed, a block is read that no row sees.
            visits=jnp.maximum(visits_before(listed, split, splits), 1),
        )

    chunk_tile.attend(
        work,
        query_ref,
        key_ref,
        value_ref,
        table_ref,
        out_refs,
        memory,
        config=config,
        group=1,
        tile_rows=TILE,
        splits=splits,
        page_size=page_size,
        scale=scale,
        interpret=interpret,
    )
