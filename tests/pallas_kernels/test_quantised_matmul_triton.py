"""The Triton kernels of quantised matmul: values in interpret mode, lowering for cuda."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases import LARGE_MATMUL, SMALL_MATMUL, MatmulCase
from pallas_kernels.operations import shapes
from pallas_kernels.quantised_matmul import api, triton
from tests.pallas_kernels.test_attention_and_scoring import lower

RUN = functools.partial(triton.matmul, interpret=True)


@pytest.mark.parametrize("case", SMALL_MATMUL, ids=lambda case: case.name)
def test_product_is_that_of_the_dense_matrix(case: MatmulCase) -> None:
    (x, weight), _ = case.arguments()
    dense = np.asarray(api.dequantise(weight, case.inputs), np.float64)
    expected = np.asarray(x, np.float64) @ dense.T
    found = np.asarray(RUN(x, weight), np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)  # the result is rounded to bf16


@pytest.mark.parametrize("case", [SMALL_MATMUL[0], SMALL_MATMUL[6]], ids=lambda case: case.name)
def test_a_row_does_not_depend_on_its_neighbours(case: MatmulCase) -> None:
    (x, weight), _ = case.arguments()
    changed = x.at[5:].set(3.0)
    np.testing.assert_array_equal(RUN(x, weight)[:5], RUN(changed, weight)[:5])
    np.testing.assert_array_equal(RUN(x, weight)[:3], RUN(x[:3], weight))


@pytest.mark.parametrize("case", [*SMALL_MATMUL, *LARGE_MATMUL[2:4], LARGE_MATMUL[8]], ids=lambda case: case.name)
def test_lowers_for_cuda(case: MatmulCase) -> None:
    assert "triton" in lower(lambda x, weight: triton.matmul(x, weight), shapes(case)[0])


def test_what_the_kernels_cannot_take_is_named() -> None:
    (x, weight), _ = SMALL_MATMUL[0].arguments()
    with pytest.raises(NotImplementedError, match="64 rows at most, got 65"):
        api.matmul(jnp.zeros((65, 256), jnp.bfloat16), weight, implementation="triton")
    with pytest.raises(NotImplementedError, match="bf16 rows, got float32"):
        api.matmul(x.astype(jnp.float32), weight, implementation="triton")
    with pytest.raises(NotImplementedError, match="dense weights of bf16"):
        api.matmul(x, jnp.zeros((128, 256), jnp.float32), implementation="triton")
    odd = api.quantise_w4(jax.random.normal(jax.random.key(0), (40, 256)))
    with pytest.raises(NotImplementedError, match="multiple of 32 outputs, got 40"):
        api.matmul(x, odd, implementation="triton")
