"""Attention on Hopper cards: the kernel for heads of 512 and that for chunks, interpreted and lowered."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import api as block_attention
from pallas_kernels.block_attention import chunk_mosaic, reference
from pallas_kernels.block_attention import mosaic as attention_mosaic
from pallas_kernels.cases.attention import LARGE_ATTENTION, SMALL_ATTENTION, AttentionCase
from pallas_kernels.operations import OPERATIONS, shapes
from tests.pallas_kernels.attention import dense_attention
from tests.pallas_kernels.running import NEEDS_INTERPRETER, lower, tolerance


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
