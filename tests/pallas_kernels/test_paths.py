"""Rows of a tree as paths of a tile: which rows one copy of the keys serves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import paths as paths_module
from pallas_kernels.block_attention.ancestry import Ancestry

paths_of = jax.jit(paths_module.paths_of, static_argnames="size")


def tree_of(*parents: int) -> Ancestry:
    """A tree of one slot; the first row is the root, of the others there is the parent."""
    depths, sees = [0], [1]
    for row, parent in enumerate(parents, 1):
        depths.append(depths[parent] + 1)
        sees.append(sees[parent] | 1 << row)
    return Ancestry(jnp.asarray([depths], jnp.int32), jnp.asarray([sees], jnp.uint32))


@pytest.mark.parametrize(
    ("parents", "size", "counts", "ends"),
    [
        ((0, 1, 2, 3, 4, 5, 6), 8, [1], [7]),
        ((0, 0, 0), 4, [3], [1, 2, 3]),
        ((0, 0, 1, 2, 1), 4, [2, 2], [2, 3, 4, 5]),  # rows 4 and 5 hang on rows of the other tile
        ((0, 1), 2, [1, 1], [1, 2]),  # the last tile has a row too few
    ],
    ids=["chain", "star", "two tiles", "part of a tile"],
)
def test_a_path_ends_at_each_row_that_no_other_of_the_tile_sees(
    parents: tuple[int, ...], size: int, counts: list[int], ends: list[int]
) -> None:
    paths = paths_of(tree_of(*parents), jnp.asarray([100], jnp.int32), size)
    assert paths.counts[0].tolist() == counts
    found = [each for tile, count in enumerate(counts) for each in paths.ends[0, tile, :count].tolist()]
    assert found == ends


def test_a_row_on_two_paths_is_taken_by_one() -> None:
    paths = paths_of(tree_of(0, 1, 1), jnp.asarray([100], jnp.int32), 4)
    assert paths.last_seen[0, 0, :2].tolist() == [[100, 101, 102, -1], [-1, -1, -1, 102]]


@pytest.mark.parametrize(("rows", "size"), [(16, 8), (32, 8), (12, 8), (32, 1), (7, 4), (2, 2)])
def test_every_row_is_taken_once_by_a_path_that_it_lies_on(rows: int, size: int) -> None:
    generator = np.random.default_rng(rows)
    for _ in range(20):
        tree = tree_of(*(int(generator.integers(max(0, row - 5), row)) for row in range(1, rows)))
        paths = paths_of(tree, jnp.asarray([7], jnp.int32), size)
        sees = np.asarray(tree.sees[0])
        for row in range(rows):
            tile = row // size
            on = np.flatnonzero(np.asarray(paths.last_seen[0, tile, :, row % size]) >= 0)
            assert len(on) == 1
            assert on[0] < int(paths.counts[0, tile])
            assert int(sees[int(paths.ends[0, tile, on[0]])]) >> row & 1
            assert int(paths.last_seen[0, tile, on[0], row % size]) == 7 + int(tree.depths[0, row])
        assert (np.asarray(paths.last_seen).reshape(-1, size) >= 0).sum() == rows  # and no row that there is not


def test_keys_of_a_path_stand_where_a_chain_has_them() -> None:
    """A tree that begins at token 6, in a ring of three pages of 4 tokens; its rows 1 and 2 hang on the root."""
    tree, starts = tree_of(0, 0, 1), jnp.asarray([6], jnp.int32)
    paths = paths_of(tree, starts, 4)
    table = jnp.asarray([[5, 7, 2]], jnp.int32)
    keys = paths_module.keys_of_paths(
        tree, paths, starts, table, key_block=4, blocks=2, page_size=4, ring=True
    )  # tokens 4 to 11
    stored = {2: [4, 5, 6, 8], 3: [4, 5, 6, 7, 9]}  # by the row at a path's end
    pages = table[0].tolist()
    for path in range(2):
        expected = [pages[token // 4] * 4 + token % 4 for token in stored[int(paths.ends[0, 0, path])]]
        assert keys[0, 0, path, : len(expected)].tolist() == expected
