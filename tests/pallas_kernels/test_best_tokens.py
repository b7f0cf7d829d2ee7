"""The largest logits of a row: both implementations against a stable sort."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.best_tokens import api, reference, triton
from pallas_kernels.cases.drafting import LARGE_BEST_TOKENS, SMALL_BEST_TOKENS, BestTokensCase
from pallas_kernels.operations import shapes
from tests.pallas_kernels.running import each_case, lower, one_program

RUN = {
    "reference": one_program(reference.best_tokens),
    "triton": functools.partial(triton.best_tokens, interpret=True),
}


@pytest.mark.parametrize("implementation", RUN)
@each_case(SMALL_BEST_TOKENS)
def test_best_tokens_are_those_of_a_stable_sort(case: BestTokensCase, implementation: str) -> None:
    (logits,), keywords = case.arguments()
    found = RUN[implementation](logits, **keywords)
    expected = np.argsort(-np.asarray(logits, np.float32), axis=1, kind="stable")[:, : case.count]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", [*SMALL_BEST_TOKENS, *LARGE_BEST_TOKENS], ids=lambda case: case.name)
def test_lowers_for_cuda(case: BestTokensCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(triton.best_tokens, **keywords), positional)


def test_a_count_beyond_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="count is 9; a row has 8 logits"):
        api.best_tokens(jnp.zeros((1, 8)), count=9)
    with pytest.raises(NotImplementedError, match="'sort'"):
        api.best_tokens(jnp.zeros((1, 8)), count=2, implementation="sort")
