"""`bench kernels` on a CPU: what it reports, what it refuses, and that a wrong kernel does not pass."""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import pytest

from dflash_jax.bench import kernels
from dflash_jax.engine.request import RequestError
from pallas_kernels.cases.attention import AttentionCase, ScoringCase
from pallas_kernels.cases.matmul import SMALL_MATMUL, MatmulCase
from pallas_kernels.operations import OPERATIONS, Limits, Operation, measure
from pallas_kernels.quantised_matmul import bench as matmul_sweep
from pallas_kernels.quantised_matmul import triton

SCORING = next(operation for operation in OPERATIONS if operation.name == "token_scoring")


def _one_case(operation: Operation) -> Operation:
    return dataclasses.replace(operation, small=operation.small[:1])


@pytest.fixture
def one_case_each(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(_one_case(operation) for operation in OPERATIONS)
    monkeypatch.setattr(kernels, "OPERATIONS", few)


@pytest.mark.slow
@pytest.mark.usefixtures("one_case_each")
def test_every_operation_is_reported(tmp_path, capsys) -> None:
    report = kernels.run(json_file=tmp_path / "kernels.json")
    assert json.loads((tmp_path / "kernels.json").read_text()) == report
    assert {"device", "versions", "command", "rows"} <= report.keys()
    assert [row["operation"] for row in report["rows"]] == [operation.name for operation in OPERATIONS]
    for row in report["rows"]:
        assert row["ok"] and row["us"] > 0 and row["us_reference"] > 0
        assert row["floor_us"] is row["of_floor"] is None
    assert "Floors are unknown" in capsys.readouterr().out


@pytest.mark.usefixtures("one_case_each")
def test_one_operation_by_its_name() -> None:
    assert [operation.name for operation, _ in kernels.cases("token_scoring")] == ["token_scoring"]
    with pytest.raises(RequestError, match="no operation 'softmax' to measure: use one of block_attention"):
        kernels.run(operation="softmax")


def test_tuning_needs_a_gpu_and_something_to_tune() -> None:
    with pytest.raises(RequestError, match="tuning needs a GPU"):
        kernels.run(tune=True)
    with pytest.raises(RequestError, match="token_scoring has nothing to tune"):
        kernels.run(tune=True, operation="token_scoring")


def test_a_wrong_kernel_does_not_pass() -> None:
    def wrong(*arguments, implementation: str | None, **keywords) -> jax.Array:
        right = SCORING.function(*arguments, implementation="reference", **keywords)
        return right if implementation == "reference" else right.at[3].mul(1.01)

    case = SCORING.small[0]
    right, not_right = measure([(SCORING, case), (dataclasses.replace(SCORING, function=wrong), case)], None)
    assert right["ok"] and not not_right["ok"]


def test_a_kernel_that_does_not_compile_is_a_row(monkeypatch, capsys) -> None:
    def refused(*arguments, implementation: str | None, **keywords) -> jax.Array:
        raise NotImplementedError("too much shared memory")

    few = (dataclasses.replace(SCORING, function=refused, small=SCORING.small[:1]), _one_case(SCORING))
    monkeypatch.setattr(kernels, "OPERATIONS", few)
    first, second = kernels.run()["rows"]
    assert not first["ok"] and first["error"] == "too much shared memory"
    assert second["ok"]
    assert "too much" in capsys.readouterr().out


def test_a_floor_is_what_takes_longer_to_read_or_to_compute() -> None:
    limits = Limits(bandwidth=1e9, flops=1e12)
    step = MatmulCase("step", 1, 128, 256)
    assert step.bytes == 128 * 256 // 2 + 2 * 128 * 256 // 32
    assert limits.seconds(step) == step.bytes / 1e9
    chunk = AttentionCase("chunk", (2,), 3, 4, 2, 8, 16, 1)
    assert chunk.flops == 2 * (3 + 4 + 5) * 4 * (8 + 8)
    assert dataclasses.replace(chunk, causal=False, window=2).flops == 2 * (2 + 2 + 2) * 4 * (8 + 8)
    assert Limits(1e12, 1e6).seconds(chunk) == chunk.flops / 1e6
    assert ScoringCase("scores", 10, 2, 4, 2, 8, 16, 1).flops == 2 * 10 * 2 * 4 * 8


def test_a_sweep_keeps_what_other_devices_have_and_writes_after_every_case(tmp_path, monkeypatch) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"another card": {"shape": {"tile": 64}}}))
    config = triton.Config(128, 2, 4, 3)
    cases = SMALL_MATMUL[:2]
    monkeypatch.setattr(matmul_sweep, "LARGE_MATMUL", cases)
    monkeypatch.setattr(matmul_sweep, "tune", lambda case, end: (case.name, config, {"case": case.name, "us": 1.0}))
    found = []
    for case, row in matmul_sweep.sweep(time.perf_counter() + 60, file):
        found.append(row["case"])
        here = json.loads(file.read_text())[jax.devices()[0].device_kind]
        assert here[case.name] == vars(config)
        assert list(here) == sorted(found)
    assert found == [case.name for case in cases]
    assert json.loads(file.read_text())["another card"] == {"shape": {"tile": 64}}
