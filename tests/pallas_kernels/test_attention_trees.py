"""Rows that form a tree have the bits of plain decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import api as block_attention
from pallas_kernels.block_attention import mosaic as attention_mosaic
from pallas_kernels.block_attention import triton as attention_triton
from pallas_kernels.block_attention.ancestry import STEP_ROWS, Ancestry
from pallas_kernels.cases.attention import SMALL_ATTENTION, AttentionCase
from pallas_kernels.operations import shapes
from tests.pallas_kernels.attention import ATTENTION, IMPLEMENTATIONS
from tests.pallas_kernels.running import NEEDS_INTERPRETER


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_tree_that_is_a_chain_has_the_bits_of_a_block(implementation: str) -> None:
    (queries, *rest), keywords = AttentionCase("block", (150, 7), 16, 4, 2, 32, 16, 16, window=20).arguments()
    depths = jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1))
    chain = Ancestry(depths, jnp.left_shift(jnp.uint32(2), depths.astype(jnp.uint32)) - 1)
    attend = ATTENTION[implementation]
    assert np.array_equal(attend(queries, *rest, chain, **keywords), attend(queries, *rest, **keywords))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name",
    [
        "tree",
        pytest.param("tree, many splits", marks=pytest.mark.slow),
        pytest.param("tree, window smaller than its depth", marks=pytest.mark.slow),
        pytest.param("tree in a ring", marks=pytest.mark.slow),
        "compact tree",
    ],
)
def test_a_node_has_the_bits_of_a_chain_of_its_ancestors(name: str, implementation: str) -> None:
    case = next(case for case in SMALL_ATTENTION if case.name == name)
    arguments, keywords = case.arguments()
    compare_nodes(case, arguments, functools.partial(ATTENTION[implementation], **keywords), range(case.rows))


@pytest.mark.parametrize("group", [3, 4])
def test_nodes_of_a_tree_of_32_rows_have_the_bits_of_steps_of_16(group: int) -> None:
    """Several tiles and lanes; with groups of 3 a tile ends within a row."""
    case = AttentionCase("", (150, 27), 32, 2 * group, 2, 32, 16, 16, tree=True)
    arguments, keywords = case.arguments()
    config = attention_triton.Config(32, 32, programs=264)
    attend = functools.partial(attention_triton.block_attention, **keywords, config=config, interpret=True)
    compare_nodes(case, arguments, attend, range(0, 32, 3), step=STEP_ROWS)


@NEEDS_INTERPRETER
@pytest.mark.parametrize(
    ("starts", "rows", "heads", "page_size", "nodes"),
    [
        ((130,), 8, 8, 64, (0, 3, 6, 7)),
        ((120,), 16, 8, 64, (0, 7, 10, 15)),
        ((250,), 16, 8, 128, (3, 9, 14)),
        ((0,), 16, 8, 64, (0, 12)),
        ((101,), 32, 8, 64, (2, 20, 31)),
        ((126,), 12, 16, 64, (1, 6, 11)),
        ((190, 0, 63, 130), 16, 8, 64, (0, 13)),
    ],
    ids=["one block", "two blocks", "page's end", "nothing before", "32 rows", "part of a tile", "four slots"],
)
def test_a_node_has_the_bits_of_a_plain_step_on_mosaic(
    starts: tuple[int, ...], rows: int, heads: int, page_size: int, nodes: Iterable[int]
) -> None:
    """Queries of f32 for results of f32, which show every bit.

    Scores must be exact: the interpreter multiplies with numpy, which rounds a row's sums by where the row stands.
    """
    pages = (max(starts) + rows) // page_size + 1
    case = AttentionCase("", starts, rows, heads, 1, 512, page_size, pages, dtype="bfloat16", key_dim=128, tree=True)
    (*arrays, table, tokens, tree), keywords = case.arguments()
    queries, keys, values = (jnp.round(array.astype(jnp.float32) * 2) / 2 for array in arrays)
    pools = (keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16))
    attend = functools.partial(attention_mosaic.block_attention, **keywords, interpret=True)
    compare_nodes(case, (queries, *pools, table, tokens, tree), attend, nodes, step=STEP_ROWS)


def compare_nodes(
    case: AttentionCase, arguments: tuple[Any, ...], function: Any, nodes: Iterable[int], *, step: int | None = None
) -> None:
    """Nodes of a tree have the bits that they have in a chain of their ancestors, at the end of a `step` of rows."""
    queries, keys, values, table, starts, tree = arguments
    step = step or case.rows
    attend = jax.jit(function)
    of_tree = np.asarray(attend(queries, keys, values, table, starts, tree))

    def place(slot: int, token: int) -> int:
        number, offset = divmod(token, case.page_size)
        return int(table[slot, number % case.pages]) * case.page_size + offset

    for node in nodes:
        in_order = np.zeros((len(case.lengths), step, *queries.shape[2:]), np.float32)
        before, last, source, target = [], [], [], []
        for slot, start in enumerate(case.lengths):
            chain = np.flatnonzero(int(tree.sees[slot, node]) >> np.arange(case.rows) & 1)
            source += [place(slot, start + int(row)) for row in chain]
            target += [place(slot, start + depth) for depth in range(len(chain))]
            before.append(max(0, len(chain) - step))  # rows of the chain that earlier steps have committed
            last.append(len(chain) - before[-1] - 1)
            in_order[slot, : last[-1] + 1] = queries[slot, chain[before[-1] :]]
        moved = [np.array(pool) for pool in (keys, values)]
        for pool in moved:
            pool[target] = pool[source]
        after = np.asarray(starts) + np.asarray(before, np.int32)
        of_chain = attend(in_order.astype(queries.dtype), *moved, table, after)
        slots = np.arange(len(last))
        assert np.array_equal(of_tree[slots, node], np.asarray(of_chain)[slots, last])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_node_does_not_depend_on_what_it_does_not_see(implementation: str) -> None:
    case = next(case for case in SMALL_ATTENTION if case.name == "tree")
    (queries, keys, values, table, starts, tree), keywords = case.arguments()
    attend = jax.jit(functools.partial(ATTENTION[implementation], **keywords))
    before = np.asarray(attend(queries, keys, values, table, starts, tree))
    for node in (3, case.rows - 1):
        number, offset = divmod(int(starts[0]) + node, case.page_size)
        place = int(table[0, number]) * case.page_size + offset
        changed = attend(queries, keys.at[place].set(9.0), values.at[place].set(9.0), table, starts, tree)
        sees = np.asarray(tree.sees)[0] >> node & 1 == 1
        assert np.array_equal(before[0, ~sees], np.asarray(changed)[0, ~sees])
        assert not np.array_equal(before[0, node], np.asarray(changed)[0, node])


@pytest.mark.parametrize(("rows", "causal"), [(8, False), (33, True)])
def test_trees_that_cannot_be_are_refused(rows: int, causal: bool) -> None:
    positional, keywords = AttentionCase("", (3,), rows, 2, 1, 16, 16, 3, causal=causal).arguments()
    nodes = jnp.zeros((1, rows), jnp.int32)
    with pytest.raises(ValueError, match=f"causal and 32 at most, got {rows}, causal {causal}"):
        block_attention.block_attention(*positional, Ancestry(nodes, nodes.astype(jnp.uint32)), **keywords)


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_a_tree_on_mosaic_has_the_splits_of_a_plain_step(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase("", (8_000,), rows, 32, 4, 512, 128, 256, dtype="bfloat16", key_dim=128, tree=True)
    found = []

    def combine(mixed: jax.Array, *_: Any, **__: Any) -> jax.Array:
        found.append(mixed.shape[0])
        return mixed

    monkeypatch.setattr(attention_mosaic, "combine", combine)
    for each in (case, dataclasses.replace(case, rows=STEP_ROWS, tree=False)):
        positional, keywords = shapes(each)
        jax.eval_shape(functools.partial(attention_mosaic.block_attention.__wrapped__, **keywords), *positional)
    assert found == [16, 16]


@pytest.mark.parametrize("group", [4, 8, 16, 32, 64])
def test_mosaic_takes_the_trees_of_models_whose_plain_steps_it_takes(group: int) -> None:
    """Or rows of a tree would not have the bits of plain decoding."""

    def takes(rows: int, *, tree: bool) -> bool:
        case = AttentionCase("", (70,), rows, group, 1, 512, 64, 6, dtype="bfloat16", key_dim=128, tree=tree)
        (queries, keys, values, *_), _ = shapes(case)
        options: dict[str, Any] = {"page_size": 64, "window": None, "causal": True, "compact": True}
        return attention_mosaic.why_not(queries, keys, values, **options, tree=tree) is None

    assert all(takes(rows, tree=True) == takes(STEP_ROWS, tree=False) for rows in range(2, 33))
