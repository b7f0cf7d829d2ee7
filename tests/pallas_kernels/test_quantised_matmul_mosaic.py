"""The Mosaic kernel of quantised matmul: values in Mosaic's interpreter, lowering for cuda, which rows run it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.matmul import LARGE_MATMUL, MatmulCase
from pallas_kernels.operations import shapes
from pallas_kernels.quantised_matmul import api, mosaic
from tests.pallas_kernels.running import NEEDS_TRANSPOSED_LOADS, lower

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
CHUNKS = [case for case in LARGE_MATMUL if case.rows > 64 and case.weights == "w4"]


@NEEDS_TRANSPOSED_LOADS
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (MatmulCase("padded rows", 130, 256, 128), mosaic.Config(128)),
        (MatmulCase("more blocks than memory holds", 128, 1024, 128), mosaic.Config(128)),
        (MatmulCase("by 128, padded inputs", 70, 500, 256, group_size=128), mosaic.Config(176)),
        (MatmulCase("splits, of which the last is shorter", 128, 384, 128), mosaic.Config(128, splits=2)),
        (MatmulCase("one block", 80, 128, 128), None),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_product_is_that_of_the_dense_matrix(case: MatmulCase, config: mosaic.Config | None) -> None:
    (x, weight), _ = case.arguments()
    dense = np.asarray(api.dequantise(weight, case.inputs), np.float64)
    expected = np.asarray(x, np.float64) @ dense.T
    found = np.asarray(mosaic.matmul(x, weight, config=config, interpret=True), np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)  # the result is rounded to bf16


@NEEDS_TRANSPOSED_LOADS
@pytest.mark.usefixtures("four_multiprocessors")
@pytest.mark.parametrize(("inputs", "splits"), [(128, 1), (384, 1), (384, 2)])
def test_programs_make_tile_after_tile_and_share_the_last(inputs: int, splits: int) -> None:
    (x, weight), _ = MatmulCase("", 256, inputs, 5 * 128).arguments()
    found = np.asarray(mosaic.matmul(x, weight, config=mosaic.Config(128, splits), interpret=True), np.float64)
    expected = np.asarray(x, np.float64) @ np.asarray(api.dequantise(weight, inputs), np.float64).T
    assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)


@NEEDS_TRANSPOSED_LOADS
def test_a_row_does_not_depend_on_its_neighbours_and_slots_stay_apart() -> None:
    x, weight = MatmulCase("", 130, 256, 128).arguments()[0]
    # Numbers whose products sum exactly: the interpreter multiplies with numpy, which rounds by a row's place.
    x = jnp.round(x * 4)
    weight = api.W4(weight.packed, jnp.ones_like(weight.scales), weight.group_size)
    run = functools.partial(mosaic.matmul, weight=weight, config=mosaic.Config(128), interpret=True)
    everything = run(x)
    np.testing.assert_array_equal(run(x.at[5:].set(3.0))[:5], everything[:5])
    np.testing.assert_array_equal(run(x.reshape(2, 65, -1)).reshape(130, -1), everything)


@NEEDS_TRANSPOSED_LOADS
@pytest.mark.parametrize("case", CHUNKS, ids=lambda case: case.name)
def test_lowers_for_cuda(case: MatmulCase) -> None:
    assert "mosaic_gpu" in lower(lambda x, weight: mosaic.matmul(x, weight), shapes(case)[0])


def test_the_rule_takes_the_fastest_that_was_measured() -> None:
    rows = json.loads((RESULTS / "h100-chunk-matmul.json").read_text(encoding="utf-8"))["rows"]
    sizes = ("rows", "inputs", "outputs")
    for size in {tuple(row[each] for each in sizes) for row in rows}:
        times = {
            mosaic.Config(**row["config"]): row["us"] for row in rows if tuple(row[each] for each in sizes) == size
        }
        config = mosaic.config_for(size[0], size[2], size[1] // mosaic.BLOCK)
        assert times[config] <= 1.07 * min(times.values()), size


@NEEDS_TRANSPOSED_LOADS
@pytest.mark.parametrize(
    ("rows", "outputs", "config", "message"),
    [
        (128, 128, mosaic.Config(128, 3), "splits=3.* does not divide 4 blocks of 128 inputs"),
        (128, 128, mosaic.Config(128, 5), "splits=5.* does not divide 4 blocks of 128 inputs"),
        (128, 100 * 128, mosaic.Config(128, 2), "does not deal shares of 100 of 1 x 100 tiles out to 132 programs"),
        (640, 27 * 128, mosaic.Config(128, 2), "does not deal shares of 3 of 5 x 27 tiles out to 132 programs"),
    ],
)
def test_configs_that_cannot_be_had_are_refused(rows: int, outputs: int, config: mosaic.Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(mosaic.matmul, config=config), *shapes(MatmulCase("", rows, 512, outputs))[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "mosaic"),
        ({"rows": 65}, "mosaic"),
        ({"rows": 64}, "triton"),
        ({"outputs": 160}, "triton"),
        ({"weights": "w8"}, "reference"),
        ({"weights": "dense"}, "reference"),
        ({"dtype": "float32"}, "reference"),
    ],
)
@pytest.mark.parametrize("hopper", [pytest.param(True, marks=NEEDS_TRANSPOSED_LOADS), False])
def test_chunks_run_on_it_on_hopper_cards(
    change: dict[str, Any], expected: str, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"rows": 1024, "inputs": 256, "outputs": 256, "dtype": "bfloat16", **change}
    ran = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(api, "on_hopper", lambda: hopper)
    for name in ("mosaic", "triton", "reference"):
        monkeypatch.setattr(getattr(api, name), "matmul", lambda x, _, name=name: ran.append(name) or x)
    x, weight = shapes(MatmulCase("", **fields))[0]
    jax.eval_shape(functools.partial(api.matmul), x, weight)
    assert ran == ["triton" if expected == "mosaic" and not hopper else expected]


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.11 has it")
def test_jax_0_10_has_it_not() -> None:
    with pytest.raises(NotImplementedError, match=r"matmul on Mosaic takes jax 0.11 or later, got 0.10"):
        api.matmul(*MatmulCase("", 128, 256, 128).arguments()[0], implementation="mosaic")


@NEEDS_TRANSPOSED_LOADS
def test_what_the_kernel_cannot_take_is_named() -> None:
    run = functools.partial(api.matmul, implementation="mosaic")
    for change, message in (
        ({"rows": 64}, "more rows than a step has, got 64"),
        ({"weights": "w8"}, "w4 weights, got W8"),
        ({"dtype": "float32"}, "bf16 rows, got float32"),
        ({"outputs": 192}, "multiple of 128 outputs, got 192"),
    ):
        arguments = shapes(MatmulCase("", **{"rows": 128, "inputs": 256, "outputs": 256, **change}))[0]
        with pytest.raises(NotImplementedError, match=f"matmul on Mosaic takes (a )?{message}"):
            jax.eval_shape(run, *arguments)
