"""Both halves of sparse attention against plain numpy loops, and the whole against dense attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.block_attention.chunk_tile import HEAD_DIMS, TILE, Config
from pallas_kernels.cases.attention import (
    LARGE_SELECTION,
    LARGE_SPARSE,
    SMALL_SELECTION,
    SMALL_SPARSE,
    AttentionCase,
    SelectionCase,
    SparseCase,
)
from pallas_kernels.operations import OPERATIONS, differing_blocks, shapes
from pallas_kernels.sparse_attention import api, mosaic, triton
from tests.pallas_kernels.running import NEEDS_INTERPRETER, each_case, lower, one_program, tolerance

SELECT = {
    "reference": one_program(api.select_blocks, implementation="reference"),
    "triton": functools.partial(triton.select_blocks, interpret=True),
    "triton, in steps": functools.partial(
        triton.select_blocks, interpret=True, config=triton.SelectConfig(means=16, listed=32)
    ),
}
ATTEND = {
    "reference": one_program(api.attend_blocks, implementation="reference"),
    "triton": functools.partial(triton.attend_blocks, interpret=True),
}
WHOLE = AttentionCase("whole", (37, 130), 75, 4, 2, 32, 32, 8)
RULE = api.SelectionRule(block_size=16)


def plain_selection(case: SelectionCase) -> dict[tuple[int, int, int], list[int]]:
    """Blocks kept by (slot, query block, head)."""
    (queries, means, starts, lengths), keywords = case.arguments()
    queries, means = np.asarray(queries, np.float64), np.asarray(means, np.float64)
    rule, scale, size = keywords["rule"], keywords["scale"], case.block_size
    kept = {}
    for slot, (start, length) in enumerate(zip(np.asarray(starts), np.asarray(lengths), strict=True)):
        for number, first in enumerate(range(start, start + case.rows, size)):
            tokens = [token for token in range(first, min(first + size, start + case.rows)) if token < length]
            for head in range(case.heads):
                scores = {}
                for token in tokens:
                    for block in range(min(token // size + 1, case.blocks)):
                        mean = means[slot, block, head // (case.heads // case.kv_heads)]
                        scores[token, block] = scale * (queries[slot, token - start, head] @ mean)
                peak = max(scores.values(), default=0.0)
                mass: dict[int, float] = {}
                for (_, block), score in scores.items():
                    mass[block] = mass.get(block, 0.0) + np.exp(score - peak)
                kept[slot, number, head] = [
                    block
                    for block in sorted(mass)
                    if mass[block] >= rule.alpha * max(mass.values())
                    or block < rule.sink
                    or block > first // size - rule.window
                    or first >= length - rule.full * size
                ]
    return kept


def lists(selection: api.Selection) -> dict[tuple[int, int, int], list[int]]:
    indices, counts = np.asarray(selection.indices), np.asarray(selection.counts)
    return {place: indices[place][: counts[place]].tolist() for place in np.ndindex(*counts.shape)}


@pytest.mark.parametrize("implementation", SELECT)
@each_case(SMALL_SELECTION)
def test_blocks_are_those_of_the_rule(case: SelectionCase, implementation: str) -> None:
    positional, keywords = case.arguments()
    assert lists(SELECT[implementation](*positional, **keywords)) == plain_selection(case)


def test_the_cases_keep_some_blocks_and_drop_others() -> None:
    case = SMALL_SELECTION[4]
    kept = plain_selection(case)
    assert all(10 < len(blocks) < 60 for blocks in kept.values())  # of 126
    assert all({0, 1, 122, 123, 124, 125} <= set(blocks) for blocks in kept.values())


def test_the_last_query_blocks_of_a_prompt_read_everything_and_padding_nothing() -> None:
    kept = plain_selection(dataclasses.replace(SMALL_SELECTION[3], rows=64, starts=(128,), lengths=(176,)))
    assert kept[0, 1, 0] == list(range(10)) and kept[0, 2, 0] == list(range(11)) and kept[0, 3, 0] == []
    assert len(kept[0, 0, 0]) < 9


def softmax_over_blocks(case: SparseCase) -> np.ndarray:
    positional, keywords = case.arguments()
    queries, keys, values, table, starts, selection = (jax.tree.map(np.asarray, each) for each in positional)
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    keys = keys if case.key_dim is None else np.concatenate([keys, values], axis=-1)
    expected = np.zeros((*queries.shape[:3], case.head_dim))
    for slot, row, head in np.ndindex(*queries.shape[:3]):
        token = starts[slot] + row
        place = (slot, row // case.block_size, head)
        blocks = selection.indices[place][: selection.counts[place]]
        seen = (blocks[:, None] * case.block_size + np.arange(case.block_size)).reshape(-1)
        seen = seen[seen <= token]
        rows = table[slot, seen // case.page_size] * case.page_size + seen % case.page_size
        of_head = head // (case.heads // case.kv_heads)
        scores = keywords["scale"] * (keys[rows, of_head] @ queries[slot, row, head].astype(np.float64))
        weights = np.exp(scores - scores.max())
        expected[slot, row, head] = weights @ values[rows, of_head] / weights.sum()
    return expected


@pytest.mark.parametrize("implementation", ATTEND)
@each_case(SMALL_SPARSE)
def test_attention_is_a_softmax_over_the_selected_blocks(case: SparseCase, implementation: str) -> None:
    positional, keywords = case.arguments()
    out = np.asarray(ATTEND[implementation](*positional, **keywords), np.float32)
    np.testing.assert_allclose(out, softmax_over_blocks(case), atol=tolerance(case.dtype), rtol=tolerance(case.dtype))


@NEEDS_INTERPRETER
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("chunk, heads of 128, two slots", None),
        ("chunk, heads of 128, two slots", Config(64, 2, splits=2)),
        ("chunk, heads of 64, first rows", None),
        ("chunk, heads of 64, first rows", Config(64, 3, splits=1)),
        ("chunk, heads of 128, last rows", None),
        ("chunk, heads of 128, last rows", Config(128, 2, splits=1)),
        ("chunk, heads of 256", None),
        ("chunk, heads of 256", Config(64, 2, splits=4)),
    ],
)
def test_mosaic_is_a_softmax_over_the_selected_blocks(name: str, config: Config | None) -> None:
    case = next(case for case in SMALL_SPARSE if case.name == name)
    positional, keywords = case.arguments()
    out = np.asarray(mosaic.attend_blocks(*positional, **keywords, config=config, interpret=True), np.float32)
    np.testing.assert_allclose(out, softmax_over_blocks(case), atol=3e-3, rtol=1e-2)  # one key more shows


@NEEDS_INTERPRETER
def test_on_mosaic_a_row_depends_on_no_other_and_not_on_where_the_chunk_begins() -> None:
    """Two splits for results of f32, which show every bit. Scores and sums are exact, as the interpreter needs it."""
    case = SparseCase("", (200, 70), 256, 2, 1, 64, 128, 4, 2, dtype="bfloat16")
    (*arrays, table, starts, selection), keywords = case.arguments()
    queries, keys, values = (jnp.round(array.astype(jnp.float32) * 2) / 2 for array in arrays)
    pools = (keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16))
    attend = functools.partial(mosaic.attend_blocks, **keywords, config=Config(64, 2, splits=2), interpret=True)
    whole = np.asarray(attend(queries, *pools, table, starts, selection))
    changed = queries.at[0, 140:].set(7.0).at[1].set(-3.0)
    fewer = api.Selection(selection.indices, selection.counts.at[1].set(1))
    others = np.asarray(attend(changed, *pools, table, starts, fewer))
    np.testing.assert_array_equal(whole[0, :140], others[0, :140])
    behind = api.Selection(selection.indices[:, 1:], selection.counts[:, 1:])
    np.testing.assert_array_equal(whole[:, 128:], attend(queries[:, 128:], *pools, table, starts + 128, behind))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("splits", [1, 4])
def test_rows_without_blocks_are_zeros_on_mosaic(splits: int) -> None:
    case = SparseCase("", (100,), 256, 2, 1, 64, 128, 8, 3, dtype="bfloat16")
    (*arrays, selection), keywords = case.arguments()
    counts = selection.counts.at[0, 1].set(0)
    config = Config(128, 2, splits)
    out = mosaic.attend_blocks(
        *arrays, api.Selection(selection.indices, counts), **keywords, config=config, interpret=True
    )
    assert np.asarray(out, np.float32)[0, :128].any(axis=-1).all() and not np.asarray(out, np.float32)[0, 128:].any()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_fit_shared_memory_on_mosaic(head_dim: int) -> None:
    config = mosaic.config_for(head_dim)
    assert TILE % config.key_block == 0 and 2 * head_dim * (TILE + 2 * config.slots * config.key_block) <= 226 * 1024


@pytest.mark.parametrize(
    ("programs", "blocks", "splits"),
    [(128, 1024, 1), (72, 64, 1), (66, 64, 2), (32, 1024, 4), (32, 4, 2), (32, 3, 1), (144, 64, 1)],
)
def test_lists_are_split_where_one_wave_has_room(programs: int, blocks: int, splits: int) -> None:
    assert mosaic.splits_of(programs, blocks) == splits


def means_of(case: AttentionCase, ends: tuple[int, ...], begins: tuple[int, ...] = (0, 0)) -> jax.Array:
    (_, key_pool, value_pool, table, _), _ = case.arguments()
    width = case.head_dim + (case.key_dim or 0)
    empty = jnp.zeros((len(ends), case.pages * case.page_size // 16, case.kv_heads, width))
    return api.update_means(
        empty,
        key_pool,
        value_pool,
        table,
        jnp.asarray(begins),
        jnp.asarray(ends),
        most=case.pages * case.page_size,
        page_size=case.page_size,
        block_size=16,
    )


@pytest.mark.parametrize("key_dim", [None, 16])
def test_everything_kept_is_dense_attention(key_dim: int | None) -> None:
    case = dataclasses.replace(WHOLE, key_dim=key_dim)
    (*arrays, table, starts), keywords = case.arguments()
    means = means_of(case, (112, 205))
    sizes = {name: keywords[name] for name in ("page_size", "scale", "compact")}
    attend, lengths = one_program(api.sparse_attention, **sizes), jnp.asarray([999, 999])
    sparse = attend(*arrays, means, table, starts, lengths, rule=dataclasses.replace(RULE, alpha=0.0))
    dense = one_program(block_attention, **sizes)(*arrays, table, starts)
    np.testing.assert_allclose(sparse, dense, atol=2e-6)
    strict = dataclasses.replace(RULE, alpha=0.999, sink=0, window=1)
    few = attend(*arrays, means, table, starts, lengths, rule=strict)
    assert np.abs(np.asarray(few - dense)).max() > 0.1


@pytest.mark.parametrize("key_dim", [None, 16])
def test_means_are_those_of_the_tokens_read_so_far(key_dim: int | None) -> None:
    case = dataclasses.replace(WHOLE, key_dim=key_dim)
    (_, *pools, table, _), _ = case.arguments()
    pool = np.asarray(pools[0] if key_dim is None else np.concatenate(pools, axis=-1))
    means = np.asarray(means_of(case, (100, 0)))
    for block in range(means.shape[1]):
        tokens = np.arange(16 * block, min(16 * block + 16, 100))
        rows = np.asarray(table)[0, tokens // 32] * 32 + tokens % 32
        expected = pool[rows].mean(axis=0) if len(tokens) else np.zeros_like(means[0, 0])
        np.testing.assert_allclose(means[0, block], expected, atol=1e-6)
    assert not means[1].any()


@pytest.mark.usefixtures("optimised")
def test_means_grow_chunk_by_chunk() -> None:
    """What a chunk adds to is as if all had been read at once, whatever tokens the chunks end at."""
    (_, *pools, table, _), _ = WHOLE.arguments()
    sizes = {"page_size": 32, "block_size": 16}
    means = means_of(WHOLE, (5, 40))
    for begin, end in (((5, 40), (41, 40)), ((41, 40), (42, 90)), ((42, 90), (101, 256))):
        means = api.update_means(means, *pools, table, jnp.asarray(begin), jnp.asarray(end), most=166, **sizes)
    np.testing.assert_array_equal(means, means_of(WHOLE, (101, 256)))


@pytest.mark.parametrize("part", ["select", "attend"])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_slot_does_not_depend_on_the_others(implementation: str, part: str) -> None:
    if part == "select":
        (queries, means, starts, lengths), keywords = SMALL_SELECTION[2].arguments()
        run = functools.partial(SELECT[implementation], **keywords)
        changed = run(queries.at[1].set(50.0), means.at[1].set(-3.0), starts.at[1].set(400), lengths.at[1].set(401))
        before, after = (lists(each) for each in (run(queries, means, starts, lengths), changed))
        assert {place: blocks for place, blocks in before.items() if place[0] == 0}.items() <= after.items()
        return
    (queries, *pools, table, starts, selection), keywords = SMALL_SPARSE[2].arguments()
    run = jax.jit(functools.partial(ATTEND[implementation], **keywords))
    changed = run(
        queries.at[1].set(50.0),
        *pools,
        table,
        starts.at[1].set(90),
        api.Selection(selection.indices, selection.counts.at[1].set(6)),
    )
    np.testing.assert_array_equal(run(queries, *pools, table, starts, selection)[0], changed[0])


@pytest.mark.usefixtures("optimised")
def test_a_row_depends_on_its_query_block_only_through_the_selection() -> None:
    (queries, *rest), keywords = SMALL_SPARSE[1].arguments()
    for attend in ATTEND.values():
        run = jax.jit(functools.partial(attend, **keywords))
        np.testing.assert_array_equal(run(queries.at[:, 7:].set(9.0), *rest)[:, :7], run(queries, *rest)[:, :7])


@pytest.mark.parametrize("case", [*SMALL_SELECTION, *LARGE_SELECTION], ids=lambda case: case.name)
def test_selecting_lowers_for_cuda(case: SelectionCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(triton.select_blocks, **keywords), positional)


@pytest.mark.parametrize("case", [*SMALL_SPARSE, *LARGE_SPARSE], ids=lambda case: case.name)
def test_attending_lowers_for_cuda(case: SparseCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(triton.attend_blocks, **keywords), positional)


def test_attending_on_mosaic_lowers_for_cuda() -> None:
    operation = next(each for each in OPERATIONS if each.name == "sparse_attention")
    cases = [case for case in [*SMALL_SPARSE, *LARGE_SPARSE] if "mosaic" in operation.kernels(case)]
    assert len(cases) == 7
    for case in cases:
        positional, keywords = shapes(case)
        assert "mosaic" in lower(functools.partial(mosaic.attend_blocks, **keywords), positional)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "mosaic"),
        ({"rows": 5}, "mosaic"),
        ({"head_dim": 32}, "triton"),
        ({"dtype": "float32"}, "triton"),
        ({"key_dim": 64}, "triton"),
        ({"block_size": 64}, "triton"),
    ],
)
def test_a_hopper_card_runs_mosaic_for_what_it_takes(
    change: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def attend_blocks(self, queries: jax.Array, *_: Any, **__: Any) -> jax.Array:
            ran.append(self.name)
            return queries

    case = SparseCase("", (70,), 128, 2, 1, 128, 128, 4, 2, dtype="bfloat16")
    positional, keywords = shapes(dataclasses.replace(case, **change))
    if expected != "mosaic":
        with pytest.raises(NotImplementedError, match="attend_blocks on Mosaic takes"):
            jax.eval_shape(functools.partial(mosaic.attend_blocks, **keywords), *positional)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(api, "on_hopper", lambda: True)
    monkeypatch.setattr(api, "ATTENDING", {name: Recorder(name) for name in api.ATTENDING})
    jax.eval_shape(functools.partial(api.attend_blocks, **keywords), *positional)
    assert ran == [expected]


def test_mosaic_refuses_keys_that_are_not_as_wide_as_values() -> None:
    pools = (jax.ShapeDtypeStruct((256, 1, width), jnp.bfloat16) for width in (64, 128))
    assert mosaic.why_not(*pools, block_size=128, compact=False) == "takes keys as wide as values, got 64 and 128"


def test_the_measure_of_two_lists_is_the_share_that_differs() -> None:
    expected = np.asarray([[[[1.0, 3.0, 4.0, 0.0]]]])
    assert differing_blocks(expected, expected) == 0.0
    assert differing_blocks(np.asarray([[[[1.0, 2.0, 3.0, 4.0]]]]), expected) == pytest.approx(1 / 3)


def test_what_cannot_be_taken_is_named() -> None:
    positional, keywords = SMALL_SELECTION[0].arguments()
    odd = {**keywords, "rule": dataclasses.replace(RULE, block_size=24)}
    with pytest.raises(NotImplementedError, match="powers of two from 16 on, got page_size 24"):
        api.select_blocks(*positional, **odd, implementation="triton")
    with pytest.raises(NotImplementedError, match="'mosaic'"):
        api.select_blocks(*positional, **keywords, implementation="mosaic")
    with pytest.raises(ValueError, match="4 heads of 16, means are"):
        api.select_blocks(positional[0], positional[1][..., :8], *positional[2:], **keywords)
    positional, keywords = SMALL_SPARSE[0].arguments()
    with pytest.raises(ValueError, match="whole blocks of 32"):
        api.attend_blocks(*positional, **{**keywords, "block_size": 32})
    with pytest.raises(ValueError, match="4 heads of 8"):
        api.attend_blocks(positional[0][..., :8], *positional[1:], **keywords)
