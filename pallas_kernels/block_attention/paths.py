"""Rows of a tree as paths: what a kernel that works on tiles of rows reads once for several of them.

Every row has the keys of its own ancestors where a chain has its rows. A row's ancestors have theirs in the same
places, so one copy of a row's keys serves all rows of its path to the root. A tile needs a copy for each of its rows
that no other of them sees: one if the tree is a chain, as many as it has rows if all hang on the root.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.paged import pool_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paths:
    """Of each slot and tile of rows, the paths that take all of its rows; there may be as many as rows."""

    counts: Int[Array, "B tiles"]
    ends: Int[Array, "B tiles paths"]
    """The row at the end of a path; row 0 behind the last path."""
    last_seen: Int[Array, "B tiles paths rows"]
    """The token index that a row sees last, on the path that takes it; -1 on all others."""


def paths_of(tree: Ancestry, starts: Int[Array, " B"], size: int) -> Paths:
    """Paths of the tiles of `size` rows."""
    slots, rows = tree.sees.shape
    tiles = -(-rows // size)

    def of_tiles(values: Array) -> Array:
        return jnp.pad(values, ((0, 0), (0, tiles * size - rows))).reshape(slots, tiles, size)

    number = jnp.arange(tiles * size, dtype=jnp.uint32).reshape(1, tiles, 1, size)
    sees = jnp.right_shift(of_tiles(tree.sees)[..., None], number) & 1 == 1  # [B, tiles, row, row that it sees]
    is_end = jnp.sum(sees, axis=2, dtype=jnp.int32) == 1  # it sees itself, and no other row sees it
    before = jnp.tri(size, k=-1, dtype=jnp.bool_)[None, None]  # [1, 1, n, earlier than n]
    place = jnp.sum(is_end[:, :, None, :] & before, axis=-1, dtype=jnp.int32)  # of an end's path among the tile's
    ends = is_end[:, :, None, :] & (place[:, :, None, :] == jnp.arange(size, dtype=jnp.int32)[None, None, :, None])
    on_path = jnp.any(ends[..., None] & sees[:, :, None], axis=3)  # [B, tiles, path, row]
    taken = jnp.any(on_path[:, :, None] & before[..., None], axis=3)  # by an earlier path
    last_seen = starts[:, None, None] + of_tiles(tree.depths)
    return Paths(
        jnp.sum(is_end, axis=-1, dtype=jnp.int32),
        jnp.sum(jnp.where(ends, number.astype(jnp.int32), 0), axis=-1),
        jnp.where(on_path & ~taken, last_seen[:, :, None], -1),
    )


def keys_of_paths(
    tree: Ancestry,
    paths: Paths,
    starts: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    *,
    key_block: int,
    blocks: int,
    page_size: int,
    ring: bool = False,
) -> Int[Array, "B tiles paths keys"]:
    """The pool's rows for the keys of the `blocks` that begin with the one where the tree does, as a chain has them."""
    token = (starts // key_block * key_block)[:, None] + jnp.arange(blocks * key_block, dtype=jnp.int32)[None]
    stored = tree.stored(starts, token)  # [B, T, keys]
    of_paths = jnp.take_along_axis(stored, paths.ends.reshape(len(starts), -1, 1), axis=1)
    at = pool_rows(of_paths.reshape(len(starts), -1), page_table, page_size, ring=ring)
    return at.reshape(*paths.ends.shape, blocks * key_block)
