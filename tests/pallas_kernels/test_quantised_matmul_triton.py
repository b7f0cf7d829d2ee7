"""The Triton kernels of quantised matmul: values in interpret mode, lowering for cuda."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.bench import shapes as published
from dflash_jax.models.hf_config import from_hf
from dflash_jax.models.parameters import drafter_parameters, target_parameters
from pallas_kernels import tuning
from pallas_kernels.cases.matmul import LARGE_MATMUL, SMALL_MATMUL, MatmulCase
from pallas_kernels.operations import shapes
from pallas_kernels.quantised_matmul import api, bench, triton
from tests.pallas_kernels.running import each_case, lower

SMALLEST = [case for case in LARGE_MATMUL if case.inputs * case.outputs < 1 << 20]
RUN = functools.partial(triton.matmul, interpret=True)


@each_case(SMALL_MATMUL)
def test_product_is_that_of_the_dense_matrix(case: MatmulCase) -> None:
    (x, weight), _ = case.arguments()
    dense = np.asarray(api.dequantise(weight, case.inputs), np.float64)
    expected = np.asarray(x, np.float64) @ dense.T
    found = np.asarray(RUN(x, weight), np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)  # the result is rounded to bf16


@pytest.mark.parametrize("case", [SMALL_MATMUL[index] for index in (0, 6, 9)], ids=lambda case: case.name)
def test_a_row_does_not_depend_on_its_neighbours(case: MatmulCase) -> None:
    (x, weight), _ = case.arguments()
    changed = x.at[5:].set(3.0)
    np.testing.assert_array_equal(RUN(x, weight)[:5], RUN(changed, weight)[:5])
    np.testing.assert_array_equal(RUN(x, weight)[:3], RUN(x[:3], weight))


@each_case(SMALL_MATMUL)
def test_parts_add_up_to_the_product(case: MatmulCase) -> None:
    (x, weight), _ = case.arguments()
    plain = ["reference", *(["int8_activations"] if case.weights == "w8" else [])]
    for implementation in plain:
        parts = api.matmul_parts(x, weight, implementation=implementation)
        assert (parts.shape, parts.dtype) == ((1, case.rows, case.outputs), x.dtype)
        np.testing.assert_array_equal(parts[0], api.matmul(x, weight, implementation=implementation))
    _, blocks = triton.blocks_of(weight, case.inputs)
    configs = [triton.Config(32, splits) for splits in range(1, blocks + 1)]
    for config in (config for config in configs if config.divides(case.outputs, blocks)):
        parts = triton.matmul_parts(x, weight, config=config, interpret=True)
        assert (parts.shape, parts.dtype) == ((config.splits, case.rows, case.outputs), jnp.float32)
        np.testing.assert_array_equal(parts.sum(axis=0).astype(x.dtype), RUN(x, weight, config=config))


def test_slots_and_rows_stay_apart_in_parts() -> None:
    (x, weight), _ = SMALL_MATMUL[0].arguments()
    config = triton.Config(32, 2)
    parts = triton.matmul_parts(x.reshape(2, 8, -1), weight, config=config, interpret=True)
    flat = triton.matmul_parts(x, weight, config=config, interpret=True)
    np.testing.assert_array_equal(parts, flat.reshape(2, 2, 8, -1))


def test_a_config_that_leaves_something_out_is_refused() -> None:
    x, weight = jnp.zeros((16, 576), jnp.bfloat16), jnp.zeros((960, 576), jnp.bfloat16)
    for config in (triton.Config(64, 6), triton.Config(128, 3)):
        with pytest.raises(ValueError, match="does not divide 960 outputs and 9 blocks of 64 inputs"):
            triton.matmul_parts(x, weight, config=config)


def weights_of_published_shapes() -> Iterator[tuple[Any, int]]:
    """Shapes of all matrices, alone and side by side as the layers read them, in every format; and their inputs."""
    sizes = {(outputs, 576) for outputs in (576, 960, 3072)} | {(576, 1536), (49_152, 576)}  # SmolLM2
    for name, fields in published.TARGETS.items():
        config = from_hf(fields)
        for table in (target_parameters(config), drafter_parameters(published._drafter_config(name, config))):
            of = {name: each.shape for name, each in table.items() if len(each.shape) == 2}
            sizes |= set(of.values())
            for name in (name for name in of if name.endswith(("attention.k", "mlp.gate"))):
                layer = name.removesuffix("attention.k").removesuffix("mlp.gate")
                side = ("attention.q", "attention.k", "attention.v") if name.endswith("k") else ("mlp.gate", "mlp.up")
                for group in (side, side[1:]):
                    outputs = sum(of[layer + each][0] for each in group if layer + each in of)
                    sizes.add((outputs, of[name][1]))
    spec = jax.ShapeDtypeStruct
    for outputs, inputs in sorted(sizes):
        padded = -(-inputs // 128) * 128
        packed = spec((padded // 4, outputs), jnp.int16)
        for group in (32, 128):
            yield api.W4(packed, spec((padded // group, outputs), jnp.float16), group), inputs
        yield api.W8(spec((outputs, inputs), jnp.int8), spec((outputs,), jnp.float32)), inputs
        yield spec((outputs, inputs), jnp.bfloat16), inputs


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "a card that nobody tuned for"])
def test_configs_divide_every_published_shape(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"device_kind": device})])
    seen = 0
    for weight, inputs in weights_of_published_shapes():
        if triton.why_not(16, jnp.bfloat16, weight):
            continue
        traced = functools.partial(triton.matmul_parts)  # a new one: JAX remembers what functions gave
        parts = jax.eval_shape(traced, jax.ShapeDtypeStruct((16, inputs), jnp.bfloat16), weight)
        config, (_, blocks) = triton.config_for(weight, inputs, 16), triton.blocks_of(weight, inputs)
        assert len(parts) == config.splits and config.divides(parts.shape[2], blocks)
        seen += 1
    assert seen > 100


@pytest.mark.parametrize("case", SMALLEST, ids=lambda case: case.name)
def test_a_sweep_tries_configs_that_divide_a_shape_and_writes_where_the_kernel_looks(
    case: MatmulCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = []

    def last_of(functions: Any, x: jax.Array, sets: Any, end: float) -> tuple[triton.Config, dict[str, Any]]:
        for config in functions:
            parts = jax.eval_shape(functools.partial(triton.matmul_parts, config=config), x, *sets[0])
            tried.append(parts.shape[0])
        return list(functions)[-1], {"tried": len(tried)}

    monkeypatch.setattr(tuning, "fastest", last_of)
    monkeypatch.setattr(bench, "copies_of", lambda weight, size, most: [weight])
    found = bench.tune(case, float("inf"))
    assert found is not None and max(tried) >= 3
    weight = case.arguments()[0][1]
    assert tried[0] == triton.rule(weight, case.inputs).splits
    name, config, row = found
    assert row["tried"] == len(tried)
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({jax.devices()[0].device_kind: {name: {**vars(config), "stages": 77}}}))
    monkeypatch.setattr(triton, "TUNED", file)
    assert triton.config_for(weight, case.inputs, case.rows).stages == 77


@pytest.mark.parametrize("case", [*SMALL_MATMUL, *LARGE_MATMUL[2:4], *LARGE_MATMUL[8:]], ids=lambda case: case.name)
def test_lowers_for_cuda(case: MatmulCase) -> None:
    assert "triton" in lower(lambda x, weight: triton.matmul(x, weight), shapes(case)[0])


def test_what_the_kernels_cannot_take_is_named() -> None:
    (x, weight), _ = SMALL_MATMUL[0].arguments()
    with pytest.raises(NotImplementedError, match="more than 64 rows of w4 only, got 65"):
        api.matmul(jnp.zeros((65, 256), jnp.bfloat16), jnp.zeros((128, 256), jnp.bfloat16), implementation="triton")
    with pytest.raises(NotImplementedError, match="bf16 rows, got float32"):
        api.matmul(x.astype(jnp.float32), weight, implementation="triton")
    with pytest.raises(NotImplementedError, match="dense weights of bf16"):
        api.matmul(x, jnp.zeros((128, 256), jnp.float32), implementation="triton")
    odd = api.quantise_w4(jax.random.normal(jax.random.key(0), (40, 256)))
    with pytest.raises(NotImplementedError, match="multiple of 32 outputs, got 40"):
        api.matmul(x, odd, implementation="triton")
