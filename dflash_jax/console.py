"""What a command shows on stderr: progress bars on a terminal, one line per step elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is (0 when nobody knows).

Amounts may be Bytes and a label a Note; who does not care takes them for the int and the str that they are.
"""

_LOG_SECONDS = 30
"""A log shows how far a step is about this often, where amounts are bytes."""


_OURS = ("checkpoints", "dflash_jax")
"""Packages whose warnings are made for the person at the terminal."""


class Bytes(int):
    """An amount that is shown in GB, with its rate and the time that is left."""


class Note(str):
    """A label that stays on the screen when the next one comes."""

    __slots__ = ()


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A function to report progress to. On a terminal there is one bar; in a log a line for each new label.

    Meanwhile warnings of this project are a line each, without the place in the code that they come from.
    """
    with _plain_warnings():
        if sys.stderr.isatty():
            with _rich_bar() as show:
                yield show
        else:
            yield _lines()


@contextmanager
def _plain_warnings() -> Iterator[None]:
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if category.__module__.partition(".")[0] in _OURS:
            print("warning:", " ".join(str(message).split()), file=sys.stderr, flush=True)
        else:
            before(message, category, *place, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def _rich_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task, pace = bars.add_task("starting", total=None, amount=""), _Pace()

        def show(label: str, done: int, total: int) -> None:
            if isinstance(label, Note):
                bars.console.print(label, highlight=False, markup=False)
                return
            amount = pace.describe(label, done, total)
            bars.update(task, description=label, completed=done, total=total or None, amount=amount)

        yield show


def _lines() -> Progress:
    started, last, shown, pace = time.monotonic(), "", 0.0, _Pace()

    def show(label: str, done: int, total: int) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if label != last or (isinstance(total, Bytes) and now - shown > _LOG_SECONDS):
            last, shown = label, now
            position = f" ({pace.describe(label, done, total)})" if total and not isinstance(label, Note) else ""
            print(f"[{now - started:6.1f} s] {label}{position}", file=sys.stderr, flush=True)

    return show


class _Pace:
    """Says how far a step is; the rate counts from what was done when its label came."""

    def __init__(self) -> None:
        self.label, self.first, self.started = "", 0, 0.0

    def describe(self, label: str, done: int, total: int) -> str:
        """`done/total`, and for bytes the rate and the time that is left."""
        now = time.monotonic()
        if label != self.label:
            self.label, self.first, self.started = label, done, now
        if not total:
            return ""
        if not isinstance(total, Bytes):
            return f"{done}/{total}"
        amount = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
        rate = (done - self.first) / (now - self.started) if now > self.started else 0.0
        return f"{amount}, {rate / 1e9:.2f} GB/s, {_time((total - done) / rate)} left" if rate else amount


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
