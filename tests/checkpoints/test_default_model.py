"""Where the default model and its drafter are kept."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest

default_model: Any = importlib.import_module("checkpoints.default_model")  # the package has a function of this name


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_drafter_that_changed_in_any_file_is_converted_anew(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    drafter = tmp_path / "drafter"
    shutil.copytree(goldens / "drafter_full", drafter)
    (drafter / "model.safetensors.index.json").write_text("{}")
    monkeypatch.setenv("DFLASH_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "DRAFTER", drafter)
    monkeypatch.setattr(default_model, "convert", lambda *arguments, **options: None)
    before = default_model.default_drafter()
    assert default_model.default_drafter() == before
    (drafter / changed).write_bytes((drafter / changed).read_bytes() + b" ")
    assert default_model.default_drafter() != before
