"""Pictures of reports: what is drawn, and what is refused before a long run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dflash_jax.bench.plot import check_plot, plot_decode, plot_prefill
from dflash_jax.engine.request import RequestError

PNG = b"\x89PNG"
HEAD = {"model": "tiny", "device": "a machine"}
DECODE_ROW = {"tok_s_plain": 10.0, "tok_s_dflash": 30.0, "accept_length": 4.0}
PREFILL_ROWS = [{"prompt_tokens": n, "ttft_s_plain": n / 500, "ttft_s_pflash": n / 900} for n in (4000, 1000)]


@pytest.mark.parametrize("row", [DECODE_ROW, {**DECODE_ROW, "tok_s_dflash": None, "accept_length": None}])
def test_decode(tmp_path: Path, row: dict[str, Any]) -> None:
    plot_decode(tmp_path / "a.png", {**HEAD, "rows": [row, row]})
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_decode_of_several_sets(tmp_path: Path) -> None:
    total = {**DECODE_ROW, "steps_by_count": [0, 5, 3, 1]}
    sets = {"code": total, "chat": total}
    plot_decode(tmp_path / "a.svg", {**HEAD, "rows": [DECODE_ROW] * 40, "sets": sets})
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn
    assert "code" in drawn


def test_prefill(tmp_path: Path) -> None:
    plot_prefill(tmp_path / "a.svg", {**HEAD, "rows": PREFILL_ROWS})
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_nothing_is_drawn_unless_asked_for(tmp_path: Path) -> None:
    check_plot(None)
    plot_decode(None, {})
    plot_prefill(None, {})
    assert not list(tmp_path.iterdir())


def test_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"must end in \.png"):
        check_plot(tmp_path / "a.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"install dflash-jax\[plot\]"):
        check_plot(tmp_path / "a.png")
