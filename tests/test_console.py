from __future__ import annotations

import warnings

import pytest

from checkpoints.readers import CheckpointWarning
from dflash_jax import console
from dflash_jax.console import Bytes, Note


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_bytes_have_a_rate_and_a_time_that_is_left(clock: list[float]) -> None:
    pace = console._Pace()
    assert pace.describe("a", Bytes(10**9), Bytes(62 * 10**9)) == "1.00/62.00 GB"
    clock[0] = 2.0
    # What was there when the label came does not count as fast work.
    assert pace.describe("a", Bytes(2 * 10**9), Bytes(62 * 10**9)) == "2.00/62.00 GB, 0.50 GB/s, 2 min 00 s left"
    assert pace.describe("b", 3, 10) == "3/10"
    assert pace.describe("b", 3, 0) == ""


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")])
def test_times(seconds: float, text: str) -> None:
    assert console._time(seconds) == text


def test_a_log_has_a_line_per_label_and_more_for_long_steps(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    show = console._lines()
    show("loading", 0, 3)
    show("loading", 1, 3)
    show("writing", Bytes(0), Bytes(4 * 10**9))
    clock[0] = 20.0
    show("writing", Bytes(10**9), Bytes(4 * 10**9))
    clock[0] = 40.0
    show("writing", Bytes(2 * 10**9), Bytes(4 * 10**9))
    show(Note("read: 4 GB"), Bytes(4), Bytes(4))
    assert [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "loading (0/3)",
        "writing (0.00/4.00 GB)",
        "writing (2.00/4.00 GB, 0.05 GB/s, 40 s left)",
        "read: 4 GB",
    ]


def test_a_terminal_keeps_notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with console._rich_bar() as show:
        show("reading", Bytes(1), Bytes(2))
        show(Note("weights read: [fast]"), Bytes(2), Bytes(2))
        show("counting", 1, 0)
    assert "weights read: [fast]" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_our_warnings_are_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: terminal, raising=False)
    others = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: others.append(str(message)))
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with console.progress_bar():
            warnings.showwarning(CheckpointWarning("tensor [a] holds\n NaN"), CheckpointWarning, "a.py", 3)
            warnings.warn("of another", UserWarning, stacklevel=1)
            warnings.warn("ours", CheckpointWarning, stacklevel=1)
    shown = capsys.readouterr().err
    assert "warning: tensor [a] holds NaN\n" in shown and "warning: ours\n" in shown
    assert "of another" not in shown and others == ["of another"]
    assert warnings.showwarning is before
