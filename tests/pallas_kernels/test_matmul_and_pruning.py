from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantised_matmul import api as quantised_matmul
from pallas_kernels.topk_pruning.api import compact, select_tokens

GENERATOR = np.random.default_rng(0)
WEIGHT = GENERATOR.standard_normal((96, 160)).astype(np.float32)
X = GENERATOR.standard_normal((16, 160)).astype(np.float32)
FORMATS = {
    "dense": jnp.asarray(WEIGHT),
    "w8": quantised_matmul.quantise_w8(jnp.asarray(WEIGHT)),
    "w4 by 32": quantised_matmul.quantise_w4(jnp.asarray(WEIGHT), 32),
    "w4 by 128": quantised_matmul.quantise_w4(jnp.asarray(WEIGHT), 128),
}


@pytest.mark.parametrize("name", FORMATS)
def test_product_is_that_of_the_dense_matrix_that_the_weight_stands_for(name: str) -> None:
    weight = FORMATS[name]
    dense = np.asarray(quantised_matmul.dequantise(weight, 160), np.float64)
    product = np.asarray(quantised_matmul.matmul(jnp.asarray(X), weight))
    np.testing.assert_allclose(product, X.astype(np.float64) @ dense.T, atol=2e-3)


@pytest.mark.parametrize(("name", "error"), [("w8", 0.5 / 127), ("w4 by 32", 1 / 6), ("w4 by 128", 1 / 6)])
def test_rounding_error_is_that_of_the_steps(name: str, error: float) -> None:
    # The largest of a w4 group is up to 9.2 steps and cut to -8, one that is as large on the other side to 7.
    dense = np.asarray(quantised_matmul.dequantise(FORMATS[name], 160))
    assert np.abs(dense - WEIGHT).max() <= error * np.abs(WEIGHT).max() * 1.05


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_w8_rows_are_bit_equal_for_any_number_of_rows(rows: int) -> None:
    multiply = jax.jit(lambda x: quantised_matmul.matmul(x, FORMATS["w8"], implementation="int8_activations"))
    assert np.array_equal(multiply(jnp.asarray(X[:rows])), multiply(jnp.asarray(X))[:rows])


def test_a_huge_activation_does_not_drown_the_others() -> None:
    x = X.copy()
    x[0, 7] = 2000.0
    dense = np.asarray(quantised_matmul.dequantise(FORMATS["w8"]), np.float64)
    product = np.asarray(quantised_matmul.matmul(jnp.asarray(x), FORMATS["w8"], implementation="int8_activations"))
    expected = x.astype(np.float64) @ dense.T
    np.testing.assert_allclose(product[0], expected[0], atol=1.5)  # 47 with one int8 per activation
    np.testing.assert_allclose(product[1:], expected[1:], atol=2e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_an_embedding(name: str) -> None:
    dense = np.asarray(quantised_matmul.dequantise(FORMATS[name], 160))
    rows = np.asarray(quantised_matmul.take_rows(FORMATS[name], jnp.asarray([[3, 95], [0, 3]])))[..., :160]
    np.testing.assert_array_equal(rows, dense[[[3, 95], [0, 3]]])


@pytest.mark.parametrize("name", FORMATS)
def test_concatenated_weights_give_both_products(name: str) -> None:
    both = quantised_matmul.matmul(jnp.asarray(X), quantised_matmul.concatenate([FORMATS[name], FORMATS[name]]))
    one = quantised_matmul.matmul(jnp.asarray(X), FORMATS[name])
    np.testing.assert_allclose(both, np.concatenate([one, one], axis=1), atol=1e-4)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_w4_packing_is_lossless(seed: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, (5, 256)).astype(np.int8)
    assert np.array_equal(quantised_matmul.unpack_w4(quantised_matmul.pack_w4(values)), values)


def _max_based_error(weight: np.ndarray, group_size: int) -> np.ndarray:
    """Squared error of each group [N, groups] when its entry of largest magnitude becomes -8, as in GGUF's Q4_0."""
    groups = weight.reshape(len(weight), -1, group_size)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
    steps = (largest / -8).astype(np.float16).astype(np.float32)
    rounded = np.clip(np.round(groups / np.where(steps == 0, 1, steps)), -8, 7) * steps
    return np.square(groups - rounded).sum(axis=2)


def _w4_error(weight: np.ndarray, group_size: int, array: Callable[[np.ndarray], Any]) -> np.ndarray:
    left = weight - np.asarray(quantised_matmul.dequantise(quantised_matmul.quantise_w4(array(weight), group_size)))
    return np.square(left.reshape(len(weight), -1, group_size)).sum(axis=2)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e4])
def test_w4_scales_lower_the_squared_error_of_every_group(
    array: Callable[[np.ndarray], Any], group_size: int, spread: float
) -> None:
    weight = (np.random.default_rng(1).standard_t(4, (70, 256)) * spread).astype(np.float32)
    weight[3] = 0
    plain, found = _max_based_error(weight, group_size), _w4_error(weight, group_size, array)
    assert np.all(found <= plain * (1 + 1e-5))
    assert found.sum() < 0.95 * plain.sum()


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from([32, 128]), st.sampled_from([np, jnp]))
@settings(max_examples=40, deadline=None)
def test_w4_keeps_values_that_are_4_bit_already(seed: int, reach: int, group_size: int, namespace: Any) -> None:
    """Any finite float16 as the scale, subnormal ones too, and values that need not use all 16 steps."""
    generator = np.random.default_rng(seed)
    values = generator.integers(-reach, min(reach, 7) + 1, (6, 256)).astype(np.float32)
    values *= generator.random(values.shape) < generator.choice([0.05, 1.0])  # some have hardly a number but 0
    bits = generator.integers(0, 0x7C00, (6, 256 // group_size)) | generator.choice([0, 0x8000])
    steps = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    weight = values * np.repeat(steps, group_size, axis=1)
    found = quantised_matmul.dequantise(quantised_matmul.quantise_w4(namespace.asarray(weight), group_size))
    np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_w4_of_weights_that_float16_scales_hardly_reach(array: Callable[[np.ndarray], Any]) -> None:
    generator = np.random.default_rng(3)
    shape = (4, 128)
    tiny = generator.uniform(-(2.0**-24), 2.0**-24, shape).astype(np.float32)
    found = np.asarray(quantised_matmul.dequantise(quantised_matmul.quantise_w4(array(tiny))))
    np.testing.assert_allclose(found, tiny, atol=2.0**-25)
    assert not found[np.abs(tiny) < 2.0**-25].any() and found[np.abs(tiny) > 2.0**-25].all()
    huge = generator.uniform(-1, 1, shape).astype(np.float32) * 1e9
    huge[:, ::32] = -1e9
    found = np.asarray(quantised_matmul.dequantise(quantised_matmul.quantise_w4(array(huge))))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, np.clip(huge, -8 * 65504, 7 * 65504), atol=65504)


def test_w4_of_numpy_and_jax_are_as_good() -> None:
    weight = np.random.default_rng(2).standard_normal((300, 4096)).astype(np.float32)  # several blocks of rows
    ours, theirs = (quantised_matmul.quantise_w4(array(weight)) for array in (np.asarray, jnp.asarray))
    assert isinstance(ours.packed, np.ndarray) and isinstance(theirs.packed, jax.Array)
    # Sums in another order may break a tie between two scales another way, nothing else.
    assert np.mean(np.asarray(theirs.packed) != ours.packed) < 1e-3
    assert (ours.packed.shape, ours.scales.shape) == ((1024, 300), (128, 300))


def test_wrong_shapes_and_formats_are_named() -> None:
    with pytest.raises(ValueError, match="x has 159 columns, the weight takes 160"):
        quantised_matmul.matmul(jnp.asarray(X[:, 1:]), FORMATS["w8"])
    with pytest.raises(ValueError, match="32 or 128"):
        quantised_matmul.quantise_w4(WEIGHT, 64)
    with pytest.raises(NotImplementedError, match="int8_activations takes W8"):
        quantised_matmul.matmul(jnp.asarray(X), FORMATS["dense"], implementation="int8_activations")


_SELECT = jax.jit(select_tokens)


@given(st.integers(0, 2**32 - 1), st.integers(1, 256), st.integers(0, 256))
@settings(max_examples=60, deadline=None)
def test_pruning_keeps_its_budget_and_everything_that_must_stay(seed: int, length: int, budget: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal(256).astype(np.float32)
    droppable = generator.random(256) < 0.8
    kept = np.asarray(_SELECT(jnp.asarray(scores), jnp.asarray(droppable), jnp.int32(length), jnp.int32(budget)))
    inside = np.arange(256) < length
    assert not kept[~inside].any()
    assert kept[inside & ~droppable].all()
    assert kept[inside & droppable].sum() <= budget
    chunks = [kept[i : i + 32][(inside & droppable)[i : i + 32]] for i in range(0, 256, 32)]
    parts = [chunk for chunk in chunks if chunk.any() and not chunk.all()]
    if parts:  # only where not even the best chunk fits
        assert len(parts) == 1 and parts[0].sum() == budget < len(parts[0])
        assert sum(chunk.any() for chunk in chunks) == 1


def test_the_best_chunks_stay() -> None:
    scores = np.zeros(256, np.float32)
    scores[70], scores[200] = 5.0, 9.0
    everything = jnp.ones(256, jnp.bool_)
    kept = np.asarray(_SELECT(jnp.asarray(scores), everything, jnp.int32(256), jnp.int32(64)))
    assert np.flatnonzero(kept).tolist() == [*range(64, 96), *range(192, 224)]
    kept = np.asarray(_SELECT(jnp.asarray(scores), everything, jnp.int32(256), jnp.int32(63)))
    assert np.flatnonzero(kept).tolist() == list(range(192, 224))


def test_a_budget_below_one_chunk_keeps_its_best_tokens() -> None:
    scores = np.zeros(256, np.float32)
    scores[70] = 5.0
    kept = np.asarray(_SELECT(jnp.asarray(scores), jnp.ones(256, jnp.bool_), jnp.int32(256), jnp.int32(13)))
    assert np.flatnonzero(kept).tolist() == list(range(64, 77))


def test_scores_that_are_not_numbers_keep_everything() -> None:
    scores = jnp.zeros(64).at[3].set(jnp.nan)
    kept = _SELECT(scores, jnp.ones(64, jnp.bool_), jnp.int32(40), jnp.int32(0))
    assert np.asarray(kept).tolist() == [True] * 40 + [False] * 24


def test_compact_lists_the_kept_in_order() -> None:
    keep = jnp.asarray([False, True, True, False, True])
    indices, count = compact(keep)
    assert int(count) == 3
    assert np.asarray(indices)[:3].tolist() == [1, 2, 4]
