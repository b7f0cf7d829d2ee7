"""The largest logits of a row: both implementations against a stable sort."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.best_tokens import api, reference, triton
from tests.pallas_kernels.test_attention_and_scoring import lower

RUN = {
    "reference": reference.best_tokens,
    "triton": functools.partial(triton.best_tokens, interpret=True),
}


@pytest.mark.parametrize("implementation", RUN)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype"), [(3, 100, "float32"), (2, 9001, "bfloat16"), (2, 8, "float32")]
)
def test_best_tokens_are_those_of_a_stable_sort(rows: int, vocabulary: int, dtype: str, implementation: str) -> None:
    numbers = np.random.default_rng(0).integers(-20, 20, (rows, vocabulary)).astype(np.float32)  # many equal ones
    found = RUN[implementation](jnp.asarray(numbers, dtype), count=8)
    np.testing.assert_array_equal(found, np.argsort(-numbers, axis=1, kind="stable")[:, :8])


@pytest.mark.parametrize("vocabulary", [49_152, 151_936, 262_144])
def test_lowers_for_cuda(vocabulary: int) -> None:
    assert "triton" in lower(functools.partial(triton.best_tokens, count=8), (jnp.zeros((15, vocabulary)),))


def test_a_count_beyond_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="count is 9; a row has 8 logits"):
        api.best_tokens(jnp.zeros((1, 8)), count=9)
    with pytest.raises(NotImplementedError, match="'sort'"):
        api.best_tokens(jnp.zeros((1, 8)), count=2, implementation="sort")
