"""The parts of tools/gpu_check.py, their order, and what is left of a run that is cut or that meets an error."""

from __future__ import annotations

import json
import sys
import types

import pytest

from tests.conftest import REPOSITORY


class Cut(Exception):
    """Stands for the end of the time that a run has."""


@pytest.fixture
def gpu_check(monkeypatch):
    """The tool with a model of two paths, and with kernels whose checks are not made."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import gpu_check

    models = types.ModuleType("gpu_models")
    models.model_rows = lambda model: iter([{"check": "logits", "ok": True}, {"check": "plain", "ok": True}])
    monkeypatch.setitem(sys.modules, "gpu_models", models)
    monkeypatch.setattr(gpu_check, "load_model", lambda path: types.SimpleNamespace(model_id=f"model {path}"))
    monkeypatch.setattr(gpu_check, "measure", lambda todo, limits: map(row_of, todo))
    return gpu_check


def row_of(pair):
    operation, case = pair
    return {"operation": operation.name, "case": case.name, "ok": True}


def run(tool, monkeypatch, folder, *arguments):
    """The exit status and the report."""
    file = folder / "report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--json", str(file)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return ended.value.code, json.loads(file.read_text())


def test_everything_is_checked_and_told_of_and_models_come_first(gpu_check, monkeypatch, tmp_path, capsys):
    status, report = run(gpu_check, monkeypatch, tmp_path)
    assert (status, report["model"]) == (0, "model None")
    assert [row["check"] for row in report["model_rows"]] == ["logits", "plain"]
    todo = gpu_check.cases()
    assert report["rows"] == [row_of(each) for each in todo]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("[model path 2, 0 s] ")
    assert lines[2].startswith(f"[case 1 of {len(todo)}, ")
    assert lines[-2].startswith(f"[case {len(todo)} of {len(todo)}, ")
    assert lines[-1] == f"0 of {len(todo) + 2} checks failed"


@pytest.mark.parametrize(
    ("arguments", "operations", "models"),
    [
        ("--only models", set(), 2),
        ("--only kernels", None, 0),
        ("--operation draft_tree --operation best_tokens", {"draft_tree", "best_tokens"}, 0),
        ("--only kernels --operation draft_tree", {"draft_tree"}, 0),
    ],
)
def test_a_part_of_it(gpu_check, monkeypatch, tmp_path, arguments, operations, models):
    status, report = run(gpu_check, monkeypatch, tmp_path, *arguments.split())
    every = {operation.name for operation, _ in gpu_check.cases()}
    assert (status, len(report["model_rows"])) == (0, models)
    assert {row["operation"] for row in report["rows"]} == (every if operations is None else operations)


def test_a_run_that_is_cut_leaves_what_it_found(gpu_check, monkeypatch, tmp_path):
    def cut(todo, limits):
        yield row_of(todo[0])
        raise Cut

    monkeypatch.setattr(gpu_check, "measure", cut)
    file = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--json", str(file)])
    with pytest.raises(Cut):
        gpu_check.main()
    report = json.loads(file.read_text())
    assert (len(report["model_rows"]), len(report["rows"])) == (2, 1)


def test_something_wrong_has_status_1(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "measure", lambda *_: [{"operation": "a", "case": "b", "ok": False}])
    assert run(gpu_check, monkeypatch, tmp_path)[0] == 1
    assert "1 of 3 checks failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--operation softmax", "there is no operation 'softmax'"),
        ("--operation draft_tree --only models", "--operation is about kernels"),
        ("--operation draft_tree --model x", "--operation is about kernels"),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(gpu_check, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_model_path_that_ends_in_an_error_is_a_row_and_the_others_run(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import gpu_models

    def broken(model):
        yield {"check": "plain", "ok": True}
        raise RuntimeError("no kernel takes this")

    for name in ("_logits", "_pruning", "_rings"):
        monkeypatch.setattr(gpu_models, name, lambda model: iter([{"check": model, "ok": True}]))
    monkeypatch.setattr(gpu_models, "_decoding", broken)
    rows = list(gpu_models.model_rows("m"))
    assert [row["ok"] for row in rows] == [True, True, False, True, True]
    assert rows[2] == {"check": "broken", "error": "RuntimeError: no kernel takes this", "ok": False}
