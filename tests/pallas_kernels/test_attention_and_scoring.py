"""Every implementation of block attention and token scoring on the same cases, against dense softmax in numpy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.block_attention import api as block_attention
from pallas_kernels.block_attention import chunk_mosaic, reference
from pallas_kernels.block_attention import mosaic as attention_mosaic
from pallas_kernels.block_attention import triton as attention_triton
from pallas_kernels.block_attention.ancestry import STEP_ROWS, Ancestry
from pallas_kernels.cases.attention import (
    LARGE_ATTENTION,
    LARGE_SCORING,
    SMALL_ATTENTION,
    SMALL_SCORING,
    AttentionCase,
    ScoringCase,
)
from pallas_kernels.online_softmax import step_size
from pallas_kernels.operations import OPERATIONS, Operation, shapes
from pallas_kernels.token_scoring import api as token_scoring
from pallas_kernels.token_scoring import triton as scoring_triton
from tests.pallas_kernels.compiled import one_program

ATTENTION = {
    "reference": one_program(block_attention.block_attention, implementation="reference"),
    "triton": functools.partial(attention_triton.block_attention, interpret=True),
    "triton, keys first": functools.partial(
        attention_triton.block_attention, interpret=True, config=attention_triton.Config(32, 64, keys_first=True)
    ),
}
IMPLEMENTATIONS = ["reference", "triton", pytest.param("triton, keys first", marks=pytest.mark.slow)]
SCORING = {
    "reference": one_program(token_scoring.token_scores, implementation="reference"),
    "triton": functools.partial(scoring_triton.token_scores, interpret=True),
}
NEEDS_INTERPRETER = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic's interpreter of jax 0.10 knows no transposed slice"
)
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def tolerance(dtype: str) -> float:
    return 2e-2 if dtype == "bfloat16" else 2e-5


def dense_attention(case: AttentionCase) -> np.ndarray:
    (queries, key_pool, value_pool, table, starts, *trees), _ = case.arguments()
    queries, key_pool, value_pool = (np.asarray(x, np.float64) for x in (queries, key_pool, value_pool))
    out = np.zeros((*queries.shape[:3], case.head_dim))
    key_pool = key_pool if case.key_dim is None else np.concatenate([key_pool, value_pool], axis=-1)
    group = case.heads // case.kv_heads
    for slot, start in enumerate(np.asarray(starts)):
        number, offset = np.divmod(np.arange(start + case.rows), case.page_size)
        place = np.asarray(table)[slot, number % case.pages] * case.page_size + offset
        for row in range(case.rows):
            keys = np.arange(start + row + 1 if case.causal else start + case.rows)
            tokens, token = keys, start + row  # where keys and the row stand in the text
            for tree in trees:
                ancestors = np.flatnonzero(int(tree.sees[slot, row]) >> np.arange(case.rows) & 1)
                keys = np.concatenate([np.arange(start), start + ancestors])
                tokens, token = np.arange(len(keys)), len(keys) - 1
            if case.window is not None:
                keys = keys[token - tokens < case.window]
            for head in range(case.heads):
                k, v = key_pool[place[keys], head // group], value_pool[place[keys], head // group]
                scores = k @ queries[slot, row, head] * case.head_dim**-0.5
                weights = np.exp(scores - scores.max())
                out[slot, row, head] = weights @ v / weights.sum()
    return out


def dense_scores(case: ScoringCase) -> np.ndarray:
    (queries, key_pool, table, length), _ = case.arguments()
    place = (np.asarray(table)[:, None] * case.page_size + np.arange(case.page_size)).reshape(-1)[: int(length)]
    keys = np.repeat(np.asarray(key_pool, np.float64)[place], case.heads // case.kv_heads, axis=1)
    scores = np.einsum("rhd,shd->rhs", np.asarray(queries, np.float64), keys) * case.head_dim**-0.5
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    by_row = shares.mean(1) if case.reduce == "mean" else shares.max(1)
    return np.pad(by_row.mean(0), (0, case.pages * case.page_size - int(length)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SMALL_ATTENTION, ids=lambda case: case.name)
def test_attention_is_a_dense_softmax(case: AttentionCase, implementation: str) -> None:
    positional, keywords = case.arguments()
    out = np.asarray(ATTENTION[implementation](*positional, **keywords), np.float32)
    np.testing.assert_allclose(out, dense_attention(case), atol=tolerance(case.dtype), rtol=tolerance(case.dtype))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("name", ["compact head of 512, tiles", "compact tree, tiles", "compact tree of 12 rows"])
def test_mosaic_is_a_dense_softmax(name: str) -> None:
    case = next(case for case in SMALL_ATTENTION if case.name == name)
    positional, keywords = case.arguments()
    out = np.asarray(attention_mosaic.block_attention(*positional, **keywords, interpret=True), np.float32)
    np.testing.assert_allclose(out, dense_attention(case), atol=tolerance(case.dtype), rtol=tolerance(case.dtype))


@NEEDS_INTERPRETER
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("chunk, heads of 64", None),
        ("chunk, heads of 64", chunk_mosaic.Config(64, 3, splits=1)),
        ("chunk, heads of 128, two slots", None),
        ("chunk, heads of 128, two slots", chunk_mosaic.Config(64, 2, splits=1)),
        ("chunk, heads of 256, window", None),
        ("chunk, heads of 256, window", chunk_mosaic.Config(64, 2, splits=8)),
        ("chunk, wide window in a ring", None),
        ("chunk, wide window in a ring", chunk_mosaic.Config(64, 3, splits=1)),
        ("drafter", None),
        ("drafter", chunk_mosaic.Config(64, 2, splits=1)),
        ("drafter, groups of 4", None),
        ("drafter, groups of 4", chunk_mosaic.Config(64, 2, splits=4)),
        ("drafter, heads of 64 in groups of 3", None),
        ("drafter, two tiles", None),
        ("drafter, two tiles", chunk_mosaic.Config(64, 2, splits=2)),
    ],
)
def test_chunks_on_mosaic_are_a_dense_softmax(name: str, config: chunk_mosaic.Config | None) -> None:
    case = next(case for case in SMALL_ATTENTION if case.name == name)
    positional, keywords = case.arguments()
    out = chunk_mosaic.block_attention(*positional, **keywords, config=config, interpret=True)
    expected = dense_attention(case)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-3, rtol=1e-2)  # one key more shows


@NEEDS_INTERPRETER
def test_scores_of_a_chunk_may_be_far_from_zero() -> None:
    """A maximum that is not the scores' own would take all weights to zero or to infinity."""
    case = AttentionCase("", (70,), 128, 2, 1, 64, 64, 4, dtype="bfloat16")
    (queries, *rest), keywords = case.arguments()
    out = chunk_mosaic.block_attention(queries * 64, *rest, **keywords, interpret=True)
    expected = reference.block_attention(queries * 64, *rest, **keywords)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-2)


@NEEDS_INTERPRETER
def test_rows_of_a_chunk_behind_the_last_page_stay_finite() -> None:
    """They see nothing or garbage, and their own keys and values go to page 0, which is to stay finite."""
    case = AttentionCase("", (250,), 128, 2, 1, 64, 64, 4, dtype="bfloat16", window=30)
    positional, keywords = case.arguments()
    out = chunk_mosaic.block_attention(*positional, **keywords, config=chunk_mosaic.Config(64, 2, 1), interpret=True)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    np.testing.assert_array_equal(np.asarray(out, np.float32)[0, 35:64], 0.0)


@pytest.mark.parametrize("head_dim", chunk_mosaic.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [64, 128, 256])
def test_blocks_of_a_chunk_lie_in_pages_and_fit_shared_memory(head_dim: int, page_size: int) -> None:
    config = chunk_mosaic.config_for(head_dim, page_size)
    assert page_size % config.key_block == 0
    assert 2 * head_dim * (chunk_mosaic.TILE + 2 * config.slots * config.key_block) <= 226 * 1024


@pytest.mark.parametrize(
    ("programs", "blocks", "splits"), [(78, 64, 4), (128, 1024, 1), (256, 128, 1), (32, 256, 4), (50, 64, 2), (1, 3, 1)]
)
def test_chunks_are_split_where_they_do_not_fill_the_card(programs: int, blocks: int, splits: int) -> None:
    assert chunk_mosaic.splits_of(programs, blocks) == splits


@pytest.mark.parametrize(
    ("programs", "blocks", "splits"), [(8, 1024, 16), (16, 1024, 8), (3, 64, 32), (8, 5, 2), (1, 1, 1), (264, 1024, 1)]
)
def test_rows_that_see_alike_are_split_until_they_fill_the_card(programs: int, blocks: int, splits: int) -> None:
    assert chunk_mosaic.splits_of(programs, blocks, causal=False) == splits


@NEEDS_INTERPRETER
@pytest.mark.parametrize("window", [None, 100])
def test_a_row_of_a_chunk_does_not_depend_on_where_the_chunk_begins(window: int | None) -> None:
    """Two splits for results of f32, which show every bit. Scores and sums are exact, as the interpreter needs it."""
    case = AttentionCase("", (70,), 256, 2, 1, 64, 64, 6, dtype="bfloat16", window=window)
    (*arrays, table, starts), keywords = case.arguments()
    queries, keys, values = (jnp.round(array.astype(jnp.float32) * 2) / 2 for array in arrays)
    pools = (keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16))
    config = chunk_mosaic.Config(64, 2, splits=2)
    attend = functools.partial(chunk_mosaic.block_attention, **keywords, config=config, interpret=True)
    whole = np.asarray(attend(queries, *pools, table, starts))
    for first in (40, 128):
        changed = queries.at[:, :first].set(7.0)
        part = attend(changed[:, first : first + 128], *pools, table, starts + first)
        assert np.array_equal(whole[:, first : first + 128], np.asarray(part))


@pytest.mark.parametrize("implementation", SCORING)
@pytest.mark.parametrize("case", SMALL_SCORING, ids=lambda case: case.name)
def test_scores_are_dense_attention_mass(case: ScoringCase, implementation: str) -> None:
    positional, keywords = case.arguments()
    out = np.asarray(SCORING[implementation](*positional, **keywords))
    np.testing.assert_allclose(out, dense_scores(case), atol=tolerance(case.dtype) / 10, rtol=tolerance(case.dtype))


@pytest.mark.parametrize("implementation", ATTENTION)
def test_a_row_does_not_depend_on_its_neighbours(implementation: str) -> None:
    case = SMALL_ATTENTION[1]
    (queries, *rest), keywords = case.arguments()
    attend = jax.jit(functools.partial(ATTENTION[implementation], **keywords))
    changed = queries.at[:, 7:].set(100.0).at[1].set(-3.0)
    assert np.array_equal(attend(queries, *rest)[0, :7], attend(changed, *rest)[0, :7])


@pytest.mark.parametrize("implementation", ATTENTION)
def test_a_tree_that_is_a_chain_has_the_bits_of_a_block(implementation: str) -> None:
    (queries, *rest), keywords = AttentionCase("block", (150, 7), 16, 4, 2, 32, 16, 16, window=20).arguments()
    depths = jnp.tile(jnp.arange(16, dtype=jnp.int32), (2, 1))
    chain = Ancestry(depths, jnp.left_shift(jnp.uint32(2), depths.astype(jnp.uint32)) - 1)
    attend = ATTENTION[implementation]
    assert np.array_equal(attend(queries, *rest, chain, **keywords), attend(queries, *rest, **keywords))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", ["tree", "tree, many splits", "tree, window smaller than its depth", "tree in a ring", "compact tree"]
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


@pytest.mark.parametrize(("pages", "heads", "kv_heads"), [(5, 9, 1), (16, 4, 2)])
def test_a_row_has_the_same_bits_wherever_its_step_begins(pages: int, heads: int, kv_heads: int) -> None:
    """Its scale is no power of two: a product that one loop rounds and another does not is seen."""
    generator = np.random.default_rng(pages)
    queries = generator.standard_normal((1, 40, heads, 32), np.float32)
    pools = [jnp.asarray(generator.standard_normal((16 * (pages + 1), kv_heads, 32), np.float32)) for _ in range(2)]
    table = jnp.asarray(1 + generator.permutation(pages)[None], jnp.int32)
    first = 16 * pages - 40
    attend = functools.partial(
        attention_triton.block_attention,
        page_size=16,
        scale=32**-0.5,
        config=attention_triton.Config(32, 32),
        interpret=True,
    )
    results = [
        np.asarray(attend(queries[:, begin : begin + 16], *pools, table, jnp.asarray([first + begin], jnp.int32)))
        for begin in range(24)
    ]
    for begin, result in enumerate(results):
        for later in range(begin + 1, min(begin + 16, 24)):
            assert np.array_equal(result[:, later - begin :], results[later][:, : begin - later or None])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("programs", [1, 264])
def test_rows_past_the_table_take_no_keys_from_those_inside(causal: bool, programs: int) -> None:
    case = AttentionCase("", (120,), 16, 4, 2, 16, 16, 8, causal=causal)
    arguments, keywords = case.arguments()
    config = attention_triton.Config(32, 32, programs=programs)
    result = attention_triton.block_attention(*arguments, **keywords, config=config, interpret=True)
    expected = reference.block_attention(*arguments, **keywords)
    np.testing.assert_allclose(result[:, :8], expected[:, :8], atol=1e-5)


@pytest.mark.parametrize("implementation", ATTENTION)
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


@pytest.mark.parametrize("implementation", ATTENTION)
def test_a_ring_gives_the_bits_of_a_table_of_all_pages(implementation: str) -> None:
    """Same pages in the same order: only where a page number is looked up differs."""
    case = AttentionCase("window", (150,), 16, 4, 2, 32, 16, 16, window=20)
    (*arrays, table, starts), keywords = case.arguments()
    attend = ATTENTION[implementation]
    ring = np.zeros((1, 4), np.int32)
    for number in range(7, 11):  # pages of the tokens 131 to 165, which the rows see
        ring[0, number % 4] = table[0, number]
    of_ring = attend(*arrays, jnp.asarray(ring), starts, **{**keywords, "ring": True})
    of_all = attend(*arrays, table, starts, **keywords)
    if implementation == "reference":
        assert np.array_equal(of_ring, of_all)
    else:  # a shorter table has fewer splits, which are put together in another order
        np.testing.assert_allclose(of_ring, of_all, atol=1e-6)


def test_a_ring_needs_a_window() -> None:
    positional, keywords = SMALL_ATTENTION[0].arguments()
    with pytest.raises(ValueError, match="give the window"):
        block_attention.block_attention(*positional, **{**keywords, "ring": True})


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(rows: int) -> None:
    """On a CPU with the pages that the engine uses there; XLA sums smaller pages in another order for few rows."""
    case = AttentionCase("SmolLM2 on a CPU", (300,), 16, 9, 3, 64, 256, 2)
    (queries, *pools, table, starts), keywords = case.arguments()
    attend = jax.jit(functools.partial(ATTENTION["reference"], **keywords))
    whole = attend(queries, *pools, table, starts)
    for first in (0, 3, 16 - rows):
        part = attend(queries[:, first : first + rows], *pools, table, starts + first)
        assert np.array_equal(part, whole[:, first : first + rows])


def lower(function: Any, arguments: tuple[Any, ...]) -> str:
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case", [*SMALL_ATTENTION, *LARGE_ATTENTION], ids=lambda case: case.name)
def test_attention_lowers_for_cuda(case: AttentionCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(attention_triton.block_attention, **keywords), positional)


@pytest.mark.parametrize(
    ("name", "module", "least"), [("mosaic", attention_mosaic, 10), ("chunk_mosaic", chunk_mosaic, 14)]
)
def test_mosaic_lowers_for_cuda(name: str, module: Any, least: int) -> None:
    cases = [case for case in [*SMALL_ATTENTION, *LARGE_ATTENTION] if name in OPERATIONS[0].kernels(case)]
    assert len(cases) >= least
    for case in cases:
        positional, keywords = shapes(case)
        assert "mosaic" in lower(functools.partial(module.block_attention, **keywords), positional)


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False, "window": 8},
        {"causal": False, "rows": 12},
        {"dtype": "float32"},
        {"heads": 17},
        {"rows": 64},
        {"rows": 132},
        {"head_dim": 32},
        {"key_dim": 64},
    ],
)
def test_what_the_kernel_for_chunks_does_not_take_is_named(change: dict[str, Any]) -> None:
    case = AttentionCase("", (70,), 128, 2, 1, 128, 64, 6, dtype="bfloat16")
    positional, keywords = shapes(dataclasses.replace(case, **change))
    with pytest.raises(NotImplementedError, match="on Mosaic, for chunks, takes"):
        jax.eval_shape(functools.partial(chunk_mosaic.block_attention, **keywords), *positional)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows": 16}, "triton"),
        ({"rows": 32, "tree": True}, "triton"),
        ({"rows": 64}, "triton"),
        ({"rows": 128}, "chunk_mosaic"),
        ({"rows": 128, "head_dim": 32}, "triton"),
        ({"rows": 16, "head_dim": 512, "key_dim": 128}, "mosaic"),
        ({"rows": 128, "head_dim": 512, "key_dim": 128}, "mosaic"),
        ({"rows": 16, "causal": False}, "chunk_mosaic"),
        ({"rows": 16, "causal": False, "window": 8}, "triton"),
        ({"rows": 12, "causal": False}, "triton"),
    ],
)
def test_chunks_and_rows_that_see_alike_run_on_the_kernel_for_chunks(
    change: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, blocks and trees have one kernel each: their bits are to be equal."""
    case = dataclasses.replace(AttentionCase("", (70,), 0, 8, 1, 128, 64, 6, dtype="bfloat16"), **change)
    ran = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.why_not = name, getattr(block_attention.IMPLEMENTATIONS[name], "why_not", None)

        def block_attention(self, queries: jax.Array, *_: Any, **__: Any) -> jax.Array:
            ran.append(self.name)
            return queries

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(block_attention, "on_hopper", lambda: True)
    recorders = {name: Recorder(name) for name in block_attention.IMPLEMENTATIONS}
    monkeypatch.setattr(block_attention, "IMPLEMENTATIONS", recorders)
    positional, keywords = shapes(case)
    jax.eval_shape(functools.partial(block_attention.block_attention, **keywords), *positional)
    assert ran == [expected]


@pytest.mark.parametrize("change", [{"window": 8}, {"causal": False}, {"dtype": "float32"}, {"heads": 4}, {"rows": 12}])
def test_what_mosaic_does_not_take_is_named(change: dict[str, Any]) -> None:
    case = AttentionCase("tiles", (70,), 16, 8, 1, 512, 64, 6, dtype="bfloat16", key_dim=128)
    positional, keywords = shapes(dataclasses.replace(case, **change))
    with pytest.raises(NotImplementedError, match="on Mosaic takes"):
        jax.eval_shape(functools.partial(attention_mosaic.block_attention, **keywords), *positional)


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


@pytest.mark.parametrize("case", [*SMALL_SCORING, *LARGE_SCORING], ids=lambda case: case.name)
def test_scoring_lowers_for_cuda(case: ScoringCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(scoring_triton.token_scores, **keywords), positional)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_shapes_are_those_of_the_arguments(operation: Operation) -> None:
    for case in operation.small:
        positional, keywords = case.arguments()
        expected = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), positional)
        assert shapes(case) == (expected, keywords)


def test_a_step_reads_fewer_keys_where_they_are_wide() -> None:
    assert step_size(64, 512 + 512, jnp.bfloat16) == 64  # 128 KiB
    assert step_size(64, 512 + 512, jnp.float32) == 32
    assert step_size(64, 512 + 128, jnp.float32) == 32  # 51 would fit
    assert step_size(16, 512 + 128, jnp.float32) == 16


def test_what_triton_cannot_take_is_named() -> None:
    case = AttentionCase("odd head", (3,), 1, 2, 1, 24, 16, 1)
    positional, keywords = case.arguments()
    with pytest.raises(NotImplementedError, match="head_dim 24"):
        block_attention.block_attention(*positional, **keywords, implementation="triton")
    with pytest.raises(NotImplementedError, match="'cudnn'"):
        block_attention.block_attention(*positional, **keywords, implementation="cudnn")
    assert jnp.isfinite(block_attention.block_attention(*positional, **keywords)).all()
