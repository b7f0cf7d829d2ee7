"""What a command shows on stderr: progress bars on a terminal, one line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is (0 when nobody knows)."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A function to report progress to. On a terminal there is one bar; in a log a line for each new label."""
    if sys.stderr.isatty():
        with _rich_bar() as show:
            yield show
    else:
        yield _lines()


@contextmanager
def _rich_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def show(label: str, done: int, total: int) -> None:
            bars.update(task, description=label, completed=done, total=total or None)

        yield show


def _lines() -> Progress:
    started, last = time.monotonic(), ""

    def show(label: str, done: int, total: int) -> None:
        nonlocal last
        if label != last:
            last = label
            position = f" ({done}/{total})" if total else ""
            print(f"[{time.monotonic() - started:6.1f} s] {label}{position}", file=sys.stderr, flush=True)

    return show
