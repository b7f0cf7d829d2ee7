"""Rows times the matrices that they chose: both implementations against a loop over rows; what rows depend on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.experts import LARGE_GROUPED, SMALL_GROUPED, GroupedCase
from pallas_kernels.grouped_matmul import api, mosaic, triton
from pallas_kernels.operations import shapes
from pallas_kernels.quantised_matmul.weights import dequantise
from tests.pallas_kernels.running import NEEDS_TRANSPOSED_LOADS, each_case, lower, one_program

RUN = {
    "reference": one_program(api.grouped_matmul, implementation="reference"),
    "triton": functools.partial(triton.grouped_matmul, interpret=True),
}
TILES = [case for case in SMALL_GROUPED if case.name.endswith("whole tiles")]
GATED = GroupedCase("", 16, 4, 16, 256, 64, gated=True)


def by_row(case: GroupedCase, x: Any, weight: Any, chosen: np.ndarray) -> np.ndarray:
    """A loop over rows and choices, in f64."""
    matrices = np.asarray(dequantise(weight, case.inputs), np.float64).reshape(case.groups, -1, case.inputs)
    out = np.stack([[matrices[group] @ row for group in groups] for row, groups in zip(x, chosen, strict=True)])
    if not case.gated:
        return out
    gate, up = np.split(out, 2, axis=-1)
    return gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


@pytest.mark.parametrize("implementation", RUN)
@each_case(SMALL_GROUPED)
def test_every_row_meets_the_matrices_that_it_chose(case: GroupedCase, implementation: str) -> None:
    (x, weight, chosen), keywords = case.arguments()
    found = np.asarray(RUN[implementation](x, weight, chosen, **keywords), np.float64)
    expected = by_row(case, np.asarray(x, np.float64), weight, np.asarray(chosen))
    assert found.shape == expected.shape == (case.rows, case.active, case.outputs)
    np.testing.assert_allclose(found, expected, atol=1.5e-2 * np.abs(expected).max())


@NEEDS_TRANSPOSED_LOADS
@pytest.mark.parametrize(
    "case",
    [
        *TILES,
        GroupedCase("nobody chose most", 1040, 1, 8, 128, 128, deciding=2),
        GroupedCase("several tiles of a group", 1040, 1, 2, 128, 128),
    ],
    ids=lambda case: case.name,
)
def test_on_mosaic_every_row_meets_the_matrices_that_it_chose(case: GroupedCase) -> None:
    check_on_mosaic(case)


@NEEDS_TRANSPOSED_LOADS
@pytest.mark.usefixtures("four_multiprocessors")
def test_on_mosaic_programs_make_tile_after_tile_of_several_outputs() -> None:
    check_on_mosaic(GroupedCase("", 520, 2, 3, 200, 384))


def check_on_mosaic(case: GroupedCase) -> None:
    """Against a loop over rows; a choice outside of the groups is that of the last one."""
    (x, weight, chosen), keywords = case.arguments()
    outside = jnp.where(chosen == case.groups - 1, 1 << 20, chosen)
    found = np.asarray(mosaic.grouped_matmul(x, weight, outside, **keywords, interpret=True), np.float64)
    expected = by_row(case, np.asarray(x, np.float64), weight, np.asarray(chosen))
    assert found.shape == expected.shape == (case.rows, case.active, case.outputs)
    np.testing.assert_allclose(found, expected, atol=1.5e-2 * np.abs(expected).max())


@NEEDS_TRANSPOSED_LOADS
@pytest.mark.parametrize("case", [*TILES, *LARGE_GROUPED[-2:]], ids=lambda case: case.name)
def test_on_mosaic_lowers_for_cuda(case: GroupedCase) -> None:
    positional, keywords = shapes(case)
    assert "mosaic_gpu" in lower(functools.partial(mosaic.grouped_matmul, **keywords), positional)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "mosaic"),
        ({"rows": 64, "active": 16}, "triton"),  # a step, whose kernel is that of plain steps and blocks
        ({"rows": 128, "active": 16, "groups": 128}, "triton"),
        ({"outputs": 96}, "triton"),
        ({"weights": "w8"}, "triton"),
        ({"dtype": "float32"}, "reference"),
    ],
)
@pytest.mark.parametrize("hopper", [pytest.param(True, marks=NEEDS_TRANSPOSED_LOADS), False])
@pytest.mark.parametrize("gated", [True, False])
def test_chunks_run_on_it_on_hopper_cards(
    change: dict[str, Any], expected: str, hopper: bool, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(api, "on_hopper", lambda: hopper)
    ran = []
    for name in ("mosaic", "triton", "reference"):
        module = getattr(api, name)
        monkeypatch.setattr(module, "grouped_matmul", lambda x, *_, name=name, **__: ran.append(name) or x)
    monkeypatch.setattr(mosaic, "products", lambda x, *_, **__: ran.append("mosaic") or x)
    fields = {"rows": 1024, "active": 4, "groups": 32, "inputs": 128, "outputs": 128, **change}
    positional, keywords = shapes(GroupedCase("", gated=gated, **fields))
    jax.eval_shape(functools.partial(api.grouped_matmul if gated else api.grouped_products, **keywords), *positional)
    assert ran == ["triton" if expected == "mosaic" and not hopper else expected]


@NEEDS_TRANSPOSED_LOADS
def test_products_stand_where_their_places_say() -> None:
    (x, weight, chosen), _ = GroupedCase("", 520, 2, 4, 128, 128).arguments()
    values, place = mosaic.products(x, weight, chosen, groups=4, interpret=True)
    assert len(np.unique(place)) == chosen.size
    whole, none = api.grouped_products(x, weight, chosen, groups=4, implementation="reference")
    assert none is None
    np.testing.assert_allclose(np.float32(values[place]), np.float32(whole), atol=1.5e-2 * float(jnp.abs(whole).max()))


def run(x: Any, weight: Any, chosen: Any) -> np.ndarray:
    return np.asarray(triton.grouped_matmul(x, weight, chosen, groups=16, activation=jax.nn.silu, interpret=True))


@pytest.mark.parametrize("weights", ["w4", "w8", "dense"])
def test_a_row_has_its_bits_whoever_stands_beside_it_and_in_whatever_order(weights: str) -> None:
    (x, weight, chosen), _ = GroupedCase("", 40, 4, 16, 256, 32, gated=True, weights=weights).arguments()
    everything = run(x, weight, chosen)
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(run(x[order], weight, chosen[order]), everything[order])
    assert np.array_equal(run(x[7:8], weight, chosen[7:8]), everything[7:8])
    assert np.array_equal(run(x, weight, chosen[:, ::-1]), everything[:, ::-1])
    others = jnp.where(jnp.arange(40)[:, None] == 7, x, 1000.0 * x[::-1])
    crowded = jnp.where(jnp.arange(40)[:, None] == 7, chosen, chosen[7])
    assert np.array_equal(run(others, weight, crowded)[7], everything[7])


def test_sorted_choices_give_the_bits_of_listed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, weight, chosen), _ = GATED.arguments()
    listed = run(x, weight, chosen)
    monkeypatch.setattr(triton, "MOST_LISTED", 0)
    jax.clear_caches()
    assert np.array_equal(run(x, weight, chosen), listed)


@pytest.mark.parametrize("implementation", RUN)
@pytest.mark.parametrize("rows", [16, 300])
def test_choices_outside_are_clipped(implementation: str, rows: int) -> None:
    (x, weight, chosen), keywords = GroupedCase("", rows, 2, 4, 128, 32).arguments()
    outside = jnp.where(chosen == 0, -7, jnp.where(chosen == 3, 1 << 20, chosen))
    inside, found = (RUN[implementation](x, weight, each, **keywords) for each in (chosen, outside))
    np.testing.assert_array_equal(found, inside)


@pytest.mark.parametrize("case", [*SMALL_GROUPED, *LARGE_GROUPED], ids=lambda case: case.name)
def test_lowers_for_cuda(case: GroupedCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(triton.grouped_matmul, **keywords), positional)


def test_floors_count_what_is_chosen() -> None:
    alike, one = (GroupedCase("", rows, 8, 128, 2816, 704, gated=True, deciding=1) for rows in (16, 1))
    assert alike.bytes == one.bytes == 8 * 2816 * 1408 * 9 // 16
    assert alike.flops == 16 * one.flops


def test_what_does_not_fit_is_named() -> None:
    (x, weight, chosen), keywords = GATED.arguments()
    with pytest.raises(ValueError, match="2048 rows does not hold 17 matrices"):
        api.grouped_matmul(x, weight, chosen, groups=17)
    with pytest.raises(ValueError, match="16 rows, chosen 15"):
        api.grouped_matmul(x, weight, chosen[1:], **keywords)
    with pytest.raises(NotImplementedError, match="bf16 rows, got float32"):
        api.grouped_matmul(x.astype(jnp.float32), weight, chosen, **keywords, implementation="triton")
    with pytest.raises(NotImplementedError, match="multiple of 32 outputs of a group, got 16"):
        api.grouped_matmul(x, weight, chosen, groups=64, activation=jax.nn.silu, implementation="triton")
    with pytest.raises(NotImplementedError, match="more than 1024 choices and 32 for each group, got 64"):
        api.grouped_matmul(x, weight, chosen, **keywords, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="'sort'"):
        api.grouped_matmul(x, weight, chosen, **keywords, implementation="sort")
    with pytest.raises(ValueError, match="does not divide 64 outputs"):
        triton.grouped_matmul(x, weight, chosen, **keywords, config=triton.Config(128, 4))


@NEEDS_TRANSPOSED_LOADS
def test_tiles_of_groups_are_made_whole() -> None:
    positional, keywords = shapes(TILES[0])
    with pytest.raises(ValueError, match="made whole, got Config"):
        jax.eval_shape(functools.partial(mosaic.products, **keywords, config=mosaic.Config(128, 2)), *positional)
