"""The choice of experts and the sum of what they give: both implementations of each against f64 numpy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.experts import (
    LARGE_EXPERT_CHOICE,
    LARGE_EXPERT_SUM,
    SMALL_EXPERT_CHOICE,
    SMALL_EXPERT_SUM,
    ExpertChoiceCase,
    ExpertSumCase,
)
from pallas_kernels.expert_choice import api as choice
from pallas_kernels.expert_choice import reference as choice_reference
from pallas_kernels.expert_choice import triton as choice_triton
from pallas_kernels.expert_sum import api as total
from pallas_kernels.expert_sum import triton as total_triton
from pallas_kernels.operations import shapes
from tests.pallas_kernels.running import each_case, lower, one_program, tolerance

CHOOSE = {
    "reference": one_program(choice.choose_experts, implementation="reference"),
    "triton": functools.partial(choice_triton.choose_experts, interpret=True),
}
ADD = {
    "reference": one_program(total.expert_sum, implementation="reference"),
    "triton": functools.partial(total_triton.expert_sum, interpret=True),
}


def in_f64(arrays: Any) -> list[np.ndarray]:
    return [np.asarray(each, np.float64) for each in arrays]


def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize("implementation", CHOOSE)
@each_case(SMALL_EXPERT_CHOICE)
def test_the_likeliest_experts_are_chosen(case: ExpertChoiceCase, implementation: str) -> None:
    (*arrays, source), keywords = case.arguments()
    found = CHOOSE[implementation](*arrays, source, **keywords)
    x, router, router_scale, expert_scale, scale = in_f64(arrays)
    x = x[np.arange(case.rows) if source is None else np.asarray(source)]
    powers = np.exp(normed(x, router_scale) @ router.T)
    chosen = np.argsort(-powers, axis=1)[:, : case.active]
    best = np.take_along_axis(powers, chosen, axis=1)
    np.testing.assert_array_equal(found.chosen, chosen)
    np.testing.assert_allclose(found.weights, best / best.sum(1, keepdims=True) * expert_scale[chosen], rtol=1e-4)
    limits = {"atol": tolerance(case.dtype), "rtol": tolerance(case.dtype)}
    np.testing.assert_allclose(np.asarray(found.normed, np.float64), normed(x, scale), **limits)
    assert (found.normed.dtype, found.chosen.dtype, found.weights.dtype) == (case.dtype, jnp.int32, jnp.float32)


@pytest.mark.parametrize("implementation", CHOOSE)
def test_of_equal_experts_the_first_are_chosen(implementation: str) -> None:
    ones = (jnp.ones(64), jnp.ones(16), jnp.ones(64))
    found = CHOOSE[implementation](jnp.ones((3, 64)), jnp.ones((16, 64)), *ones, None, active=4, eps=1e-6)
    np.testing.assert_array_equal(found.chosen, [[0, 1, 2, 3]] * 3)
    np.testing.assert_allclose(found.weights, 0.25)


def test_a_choice_has_the_same_bits_whatever_stands_beside_it() -> None:
    (x, *others, _), keywords = SMALL_EXPERT_CHOICE[1].arguments()
    choose = functools.partial(CHOOSE["triton"], **keywords)
    everything = choose(x, *others, None)
    last = jnp.full(20, 17, jnp.int32)
    for found, row in (
        (choose(x[17:18], *others, None), 0),
        (choose(100.0 * x.at[17].multiply(0.01), *others, None), 17),
        (choose(x[::-1], *others, None), 2),
        (choose(x, *others, last), 5),
    ):
        if row != 17:  # which that multiplication has rounded
            assert all(
                np.array_equal(all_rows[17], some[row]) for all_rows, some in zip(everything, found, strict=True)
            )
        assert np.array_equal(found.chosen[row], everything.chosen[17])


@pytest.mark.parametrize("implementation", ADD)
@each_case(SMALL_EXPERT_SUM)
def test_both_sums_are_normed_and_added(case: ExpertSumCase, implementation: str) -> None:
    arrays, keywords = case.arguments()
    found = ADD[implementation](*arrays, **keywords)
    back, place, weights, scale, parts, parts_scale = arrays
    back = (back if place is None else back[place]).reshape(case.rows, case.active, case.dim)
    back, weights, scale, parts, parts_scale = in_f64([back, weights, scale, parts, parts_scale])
    expected = normed(parts.sum(axis=0), parts_scale) + normed((back * weights[..., None]).sum(axis=1), scale)
    assert (found.shape, found.dtype) == ((case.rows, case.dim), case.dtype)
    limits = {"atol": tolerance(case.dtype), "rtol": tolerance(case.dtype)}
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, **limits)


def test_a_sum_has_the_same_bits_whatever_stands_beside_it() -> None:
    (back, _, weights, scale, parts, parts_scale), keywords = SMALL_EXPERT_SUM[2].arguments()
    add = functools.partial(ADD["triton"], **keywords)
    whole = add(back, None, weights, scale, parts, parts_scale)
    own = jnp.arange(24, 32, dtype=jnp.int32)
    for rows, place in ((back[24:32], None), (back, own), (back[::-1], 127 - own)):
        some = add(rows, place, weights[3:4], scale, parts[:, 3:4], parts_scale)
        np.testing.assert_array_equal(some[0], whole[3])


@pytest.mark.parametrize("case", [*SMALL_EXPERT_CHOICE, *LARGE_EXPERT_CHOICE], ids=lambda case: case.name)
def test_choosing_lowers_for_cuda(case: ExpertChoiceCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(choice_triton.choose_experts, **keywords), positional)


@pytest.mark.parametrize("case", [*SMALL_EXPERT_SUM, *LARGE_EXPERT_SUM], ids=lambda case: case.name)
def test_adding_lowers_for_cuda(case: ExpertSumCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(total_triton.expert_sum, **keywords), positional)


@pytest.mark.parametrize("broken", ["row", "expert", "infinite expert"])
def test_scores_that_are_no_numbers_choose_what_the_reference_chooses(broken: str) -> None:
    case = next(case for case in SMALL_EXPERT_CHOICE if case.rows == 16 and not case.alone)
    (x, router, *others), keywords = case.arguments()
    if broken == "row":
        x = x.at[0].set(jnp.nan)
    else:
        router = router.at[5].set(jnp.nan if broken == "expert" else jnp.inf)
    found, expected = (CHOOSE[name](x, router, *others, **keywords) for name in ("triton", "reference"))
    np.testing.assert_array_equal(found.chosen, expected.chosen)
    np.testing.assert_array_equal(jnp.isnan(found.weights), jnp.isnan(expected.weights))


@pytest.mark.parametrize(
    ("rows", "name"), [(choice_triton.MOST_ROWS, "triton"), (choice_triton.MOST_ROWS + 1, "reference")]
)
def test_few_rows_choose_in_a_kernel_of_their_own(rows: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, *others), keywords = SMALL_EXPERT_CHOICE[0].arguments()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ran = []
    for each in (choice_triton, choice_reference):
        monkeypatch.setattr(each, "choose_experts", lambda *_, each=each, **__: ran.append(each.__name__))
    choice.choose_experts(jnp.resize(x, (rows, x.shape[1])), *others[:-1], None, **keywords)
    assert [each.rsplit(".", 1)[1] for each in ran] == [name]


def test_what_does_not_fit_is_named() -> None:
    (x, router, *others), keywords = SMALL_EXPERT_CHOICE[0].arguments()
    with pytest.raises(ValueError, match="16 experts and 64 numbers does not fit rows of 63"):
        choice.choose_experts(x[:, 1:], router, *others, **keywords)
    with pytest.raises(ValueError, match="active is 17; there are 16 experts"):
        choice.choose_experts(x, router, *others, active=17, eps=1e-6)
    with pytest.raises(NotImplementedError, match="multiple of 16 experts, got 15"):
        short = (router[1:], others[0], others[1][1:], *others[2:])
        choice.choose_experts(x, *short, **keywords, implementation="triton")
    with pytest.raises(NotImplementedError, match="'sort'"):
        choice.choose_experts(x, router, *others, **keywords, implementation="sort")
    arrays, keywords = SMALL_EXPERT_SUM[0].arguments()
    with pytest.raises(ValueError, match=r"weights \(1, 1\)"):
        total.expert_sum(*arrays[:2], arrays[2][:, 1:], *arrays[3:], **keywords)
    with pytest.raises(NotImplementedError, match="'sort'"):
        total.expert_sum(*arrays, **keywords, implementation="sort")
