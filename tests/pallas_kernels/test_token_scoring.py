"""Token scores against dense attention in f64."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pallas_kernels.cases.attention import LARGE_SCORING, SMALL_SCORING, ScoringCase
from pallas_kernels.operations import shapes
from pallas_kernels.token_scoring import api as token_scoring
from pallas_kernels.token_scoring import triton as scoring_triton
from tests.pallas_kernels.running import each_case, lower, one_program, tolerance

SCORING = {
    "reference": one_program(token_scoring.token_scores, implementation="reference"),
    "triton": functools.partial(scoring_triton.token_scores, interpret=True),
}


def dense_scores(case: ScoringCase) -> np.ndarray:
    (queries, key_pool, table, length), _ = case.arguments()
    place = (np.asarray(table)[:, None] * case.page_size + np.arange(case.page_size)).reshape(-1)[: int(length)]
    keys = np.repeat(np.asarray(key_pool, np.float64)[place], case.heads // case.kv_heads, axis=1)
    scores = np.einsum("rhd,shd->rhs", np.asarray(queries, np.float64), keys) * case.head_dim**-0.5
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    by_row = shares.mean(1) if case.reduce == "mean" else shares.max(1)
    return np.pad(by_row.mean(0), (0, case.pages * case.page_size - int(length)))


@pytest.mark.parametrize("implementation", SCORING)
@each_case(SMALL_SCORING)
def test_scores_are_dense_attention_mass(case: ScoringCase, implementation: str) -> None:
    positional, keywords = case.arguments()
    out = np.asarray(SCORING[implementation](*positional, **keywords))
    np.testing.assert_allclose(out, dense_scores(case), atol=tolerance(case.dtype) / 10, rtol=tolerance(case.dtype))


@pytest.mark.parametrize("case", [*SMALL_SCORING, *LARGE_SCORING], ids=lambda case: case.name)
def test_scoring_lowers_for_cuda(case: ScoringCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(scoring_triton.token_scores, **keywords), positional)
