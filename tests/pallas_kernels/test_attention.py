"""Attention against a dense softmax in f64, the bits of its rows, and lowering for a card."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import api as block_attention
from pallas_kernels.block_attention import reference
from pallas_kernels.block_attention import triton as attention_triton
from pallas_kernels.cases.attention import LARGE_ATTENTION, SMALL_ATTENTION, AttentionCase
from pallas_kernels.online_softmax import step_size
from pallas_kernels.operations import shapes
from tests.pallas_kernels.attention import ATTENTION, IMPLEMENTATIONS, dense_attention
from tests.pallas_kernels.running import each_case, lower, tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_case(SMALL_ATTENTION)
def test_attention_is_a_dense_softmax(case: AttentionCase, implementation: str) -> None:
    positional, keywords = case.arguments()
    out = np.asarray(ATTENTION[implementation](*positional, **keywords), np.float32)
    np.testing.assert_allclose(out, dense_attention(case), atol=tolerance(case.dtype), rtol=tolerance(case.dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_neighbours(implementation: str) -> None:
    case = SMALL_ATTENTION[1]
    (queries, *rest), keywords = case.arguments()
    attend = jax.jit(functools.partial(ATTENTION[implementation], **keywords))
    changed = queries.at[:, 7:].set(100.0).at[1].set(-3.0)
    assert np.array_equal(attend(queries, *rest)[0, :7], attend(changed, *rest)[0, :7])


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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


@pytest.mark.usefixtures("optimised")
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


@pytest.mark.parametrize("case", [*SMALL_ATTENTION, *LARGE_ATTENTION], ids=lambda case: case.name)
def test_attention_lowers_for_cuda(case: AttentionCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(attention_triton.block_attention, **keywords), positional)


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
