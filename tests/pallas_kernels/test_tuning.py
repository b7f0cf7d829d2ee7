"""Sweeps over configs, and the files that keep what they find."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.block_attention import bench, triton
from pallas_kernels.block_attention.ancestry import STEP_ROWS
from pallas_kernels.cases.attention import LARGE_ATTENTION, AttentionCase

X, SETS = jnp.ones((256, 256)), [(jnp.ones((256, 256)),)]


def times(count: int, x: jax.Array, other: jax.Array) -> jax.Array:
    for _ in range(count):
        x = jnp.tanh(x @ other)
    return x


def refused(x: jax.Array, other: jax.Array) -> jax.Array:
    raise NotImplementedError("more shared memory than there is")


def test_the_fastest_is_found_and_what_does_not_compile_is_left_out() -> None:
    functions = {
        "slow": lambda x, other: times(40, x, other),
        "refused": refused,
        "fast": lambda x, other: times(1, x, other),
    }
    found = tuning.fastest(functions, X, SETS, time.perf_counter() + 60)
    assert found is not None
    config, row = found
    assert config == "fast"
    assert row["tried"] == 2 and row["us"] < row["first_us"]
    assert tuning.fastest({"refused": refused}, X, SETS, time.perf_counter() + 60) is None


def test_a_sweep_ends_with_its_time_but_not_before_the_first_configs() -> None:
    functions = {number: lambda x, other: x + other for number in range(1000)}
    found = tuning.fastest(functions, X, SETS, time.perf_counter())
    assert found is not None and 0 < found[1]["tried"] < 1000


def test_what_was_tuned_is_that_of_this_device(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    assert tuning.tuned(tmp_path / "none.json", "shape") is None
    here = jax.devices()[0].device_kind
    file.write_text(json.dumps({here: {"shape": {"tile": 64}}, "another card": {"other": {"tile": 32}}}))
    assert tuning.tuned(file, "shape") == {"tile": 64}
    assert tuning.tuned(file, "other") is None


def test_a_card_of_the_same_chip_takes_what_it_has_no_sweep_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, swept = tmp_path / "tuned.json", "NVIDIA H100 80GB HBM3"
    file.write_text(json.dumps({swept: {"a": {"tile": 64}, "b": {"tile": 64}}, "NVIDIA H200": {"b": {"tile": 32}}}))
    for device, a, b in (("NVIDIA H200", 64, 32), ("NVIDIA H100 PCIe", 64, 64), ("NVIDIA RTX 4090", None, None)):
        monkeypatch.setattr(jax, "devices", lambda kind=device: [SimpleNamespace(device_kind=kind)])
        assert tuning.tuned(file, "a") == (a and {"tile": a})
        assert tuning.tuned(file, "b") == (b and {"tile": b})


@pytest.mark.parametrize("case", LARGE_ATTENTION, ids=lambda case: case.name)
def test_attention_tries_its_rule_first_and_nothing_twice(case: AttentionCase) -> None:
    configs = list(bench.configs(case))
    rows = STEP_ROWS if case.tree else case.rows
    assert configs[0] == triton.rule(rows * case.heads // case.kv_heads, case.head_dim)
    assert len(set(configs)) == len(configs) > 10
    assert all(config.key_block <= case.page_size for config in configs)


def test_every_config_of_the_file_can_be_found_by_a_sweep() -> None:
    for known in json.loads(triton.TUNED.read_text()).values():
        for case in LARGE_ATTENTION:
            if (key := bench._key(case)) in known:
                assert triton.Config(**known[key]) in set(bench.configs(case)), key


def test_attention_has_a_config_for_every_kind_of_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = triton.Config(16, 64, keys_first=True)
    monkeypatch.setattr(bench, "tune", lambda group, end: (group.name, config, {"case": group.name}))
    file = tmp_path / "tuned.json"
    groups = {group.name: group.cases for group, _ in bench.sweep(time.perf_counter() + 60, file)}
    assert {case.name for cases in groups.values() for case in cases} == {
        case.name for case in LARGE_ATTENTION if case.causal
    }
    assert {case.tree for case in groups["few lines, heads of 256"]} == {True, False}
    monkeypatch.setattr(triton, "TUNED", file)
    assert triton.config_for(128, 128, 512) == config
    assert triton.config_for(128, 16, 32) == triton.rule(128, 32)
