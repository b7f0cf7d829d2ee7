"""Every implementation of residual_norm on the same cases, against sums and norms in f64 numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.layers import LARGE_RESIDUAL_NORM, SMALL_RESIDUAL_NORM, ResidualNormCase
from pallas_kernels.operations import shapes, stream_and_norm
from pallas_kernels.residual_norm import api, triton
from tests.pallas_kernels.running import each_case, lower, one_program, tolerance

IMPLEMENTATIONS = {
    "reference": one_program(api.residual_norm, implementation="reference"),
    "triton": functools.partial(triton.residual_norm, interpret=True),
}
IN_BF16 = [case for case in SMALL_RESIDUAL_NORM if case.dtype == "bfloat16"]


def run(implementation: str, parts, stream, scale, post_scale, factor, *, eps: float) -> tuple[jax.Array, jax.Array]:
    options = {"post_scale": post_scale, "factor": factor, "eps": eps}
    return IMPLEMENTATIONS[implementation](parts, stream, scale, **options)


def in_f64(case: ResidualNormCase) -> tuple[np.ndarray, np.ndarray]:
    arguments, keywords = case.arguments()
    parts, stream, scale, post_scale, factor = (
        None if each is None else np.asarray(each, np.float64) for each in arguments
    )

    def normed(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + keywords["eps"])

    update = parts.sum(axis=0)
    if post_scale is not None:
        update = normed(update) * post_scale
    stream = (stream + update) * (1.0 if factor is None else factor)
    return stream, normed(stream) * scale


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_case(SMALL_RESIDUAL_NORM)
def test_stream_and_norm_are_those_of_f64(case: ResidualNormCase, implementation: str) -> None:
    arguments, keywords = case.arguments()
    for found, expected in zip(run(implementation, *arguments, **keywords), in_f64(case), strict=True):
        assert (found.shape, found.dtype) == ((case.rows, case.dim), case.dtype)
        limits = {"atol": tolerance(case.dtype), "rtol": tolerance(case.dtype)}
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, **limits)


@each_case(IN_BF16)
def test_both_implementations_round_at_the_same_places(case: ResidualNormCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference step by step: which roundings XLA leaves out of a program depends on how it fuses."""
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", functools.partial(api.residual_norm, implementation="reference"))
    arguments, keywords = case.arguments()
    results = (run(implementation, *arguments, **keywords) for implementation in IMPLEMENTATIONS)
    for reference, kernel in zip(*results, strict=True):
        np.testing.assert_array_equal(kernel, reference)


def test_the_norm_is_that_of_the_rounded_stream() -> None:
    """Who norms the stream afterwards, as a pass with fewer layers does, gets the same numbers."""
    arguments, keywords = IN_BF16[-1].arguments()
    stream, normed = run("triton", *arguments, **keywords)
    np.testing.assert_array_equal(normed, api.rms_norm(stream, arguments[2], **keywords))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [SMALL_RESIDUAL_NORM[2], IN_BF16[-1]], ids=lambda case: case.name)
def test_bits_of_a_row_depend_neither_on_its_neighbours_nor_on_the_number_of_rows(
    case: ResidualNormCase, implementation: str
) -> None:
    (parts, stream, *others), keywords = case.arguments()
    apply = jax.jit(functools.partial(run, implementation, **keywords))
    whole = apply(parts, stream, *others)
    changed = apply(parts.at[:, 7:].set(100.0), stream.at[7:].set(-3.0), *others)
    for before, after in zip(whole, changed, strict=True):
        np.testing.assert_array_equal(before[:7], after[:7])
    for rows in (1, 2, 3, 8):
        for first in (0, 5, 16 - rows):
            some = slice(first, first + rows)
            for all_rows, few in zip(whole, apply(parts[:, some], stream[some], *others), strict=True):
                np.testing.assert_array_equal(all_rows[some], few)


@pytest.mark.parametrize("case", [*SMALL_RESIDUAL_NORM, *LARGE_RESIDUAL_NORM], ids=lambda case: case.name)
def test_lowers_for_cuda(case: ResidualNormCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(stream_and_norm, **keywords, implementation="triton"), positional)


def test_what_does_not_fit_is_named() -> None:
    (parts, stream, scale, *_), keywords = SMALL_RESIDUAL_NORM[0].arguments()
    with pytest.raises(ValueError, match=r"stream \(15, 64\)"):
        api.residual_norm(parts, stream[1:], scale, **keywords)
    with pytest.raises(ValueError, match=r"scale \(63,\)"):
        api.residual_norm(parts, stream, scale[1:], **keywords)
    with pytest.raises(ValueError, match=r"post_scale \(63,\)"):
        api.residual_norm(parts, stream, scale, post_scale=scale[1:], **keywords)
    with pytest.raises(NotImplementedError, match="'mosaic': use one of"):
        api.residual_norm(parts, stream, scale, **keywords, implementation="mosaic")


def test_a_case_counts_what_is_read_written_and_computed() -> None:
    case = ResidualNormCase("sandwich", 2, 8, 3, sandwich=True, scaled=True, dtype="bfloat16")
    assert case.bytes == 2 * 8 * (3 * 4 + 2 + 2 * 2) + 2 * 8 * 4  # parts, stream, both results; both scales
    assert case.flops == 2 * 8 * (2 + 4 + 1 + 1 + 4)  # parts, norm, stream, factor, norm
    assert ResidualNormCase("one part", 1, 8, 1, dtype="bfloat16").bytes == 8 * (2 + 2 + 2 * 2) + 8 * 4


def test_one_row_by_hand() -> None:
    """(1, 1) + (2, 6) has a mean square of 29; doubled, of 116."""
    parts, stream = jnp.asarray([[[1.0, 2.0]], [[1.0, 4.0]]]), jnp.asarray([[1.0, 1.0]])
    for implementation in IMPLEMENTATIONS:
        both = run(implementation, parts, stream, jnp.asarray([1.0, 10.0]), None, jnp.asarray([2.0]), eps=0.0)
        np.testing.assert_allclose(both[0], [[6.0, 14.0]])
        np.testing.assert_allclose(both[1], [[6 / 116**0.5, 140 / 116**0.5]], rtol=1e-6)
