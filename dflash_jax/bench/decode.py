"""`dflash-jax bench decode`: tokens per second with and without DFlash, on the same prompts in the same run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from dflash_jax.bench.plot import check_plot, plot_decode
from dflash_jax.bench.report import environment, read_prompts, write
from dflash_jax.console import progress_bar
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import load_model
from dflash_jax.engine.request import Result


def run(
    model: Path | None,
    *,
    prompts: Sequence[Path] = (),
    json_file: Path | None = None,
    plot: Path | None = None,
    drafter: Path | None = None,
    max_tokens: int = 128,
    limit: int | None = None,
    temperature: float = 0.0,
    dflash: Literal["auto", "on"] = "on",
    tree: int | None = None,
) -> dict[str, Any]:
    """Answers every prompt without and (if there is a drafter) with DFlash, prints a table, returns the report.

    Both run prompt by prompt, one after the other, so that a busy machine slows both alike. Rates are tokens of the
    answer over seconds after prefill; totals, of each file of prompts and of all, are all tokens over all seconds.
    `limit` takes the first prompts of each file; `dflash` is "on", or "auto" as when serving: only while it pays.
    With a `tree` DFlash verifies so many rows as a tree, with 0 a chain.
    """
    check_plot(plot)
    chats = [(file.stem if file else "own", chat) for file in prompts or (None,) for chat in read_prompts(file)[:limit]]
    with progress_bar() as progress:
        loaded = load_model(model, drafter=drafter, progress=progress)
        rows = []
        with _ready(Engine(loaded, dflash="off", pflash="off"), progress) as plain, contextlib.ExitStack() as stack:
            fast = None
            if loaded.drafter is not None:
                fast = stack.enter_context(_ready(Engine(loaded, dflash=dflash, tree=tree, pflash="off"), progress))
            options: Any = {"max_tokens": max_tokens, "temperature": temperature, "seed": 0}
            for index, (name, chat) in enumerate(chats):
                progress("prompts", index, len(chats))
                one = plain.generate(chat, **options)
                rows.append(_row(name, one, fast.generate(chat, **options) if fast else None))
            progress("prompts", len(chats), len(chats))
    report = {
        **environment(),
        "model": loaded.model_id,
        "temperature": temperature,
        "tree": loaded.profile.with_tree(tree).tree_rows,
        "rows": [row for row, _, _ in rows],
        "sets": {
            name: _total([row for row in rows if row[0]["set"] == name]) for name in dict.fromkeys(n for n, _ in chats)
        },
        "total": _total(rows),
    }
    _print(report)
    write(json_file, report)
    plot_decode(plot, report)
    return report


@contextlib.contextmanager
def _ready(engine: Engine, progress: Any) -> Iterator[Engine]:
    try:
        engine.warm_up(progress)
        yield engine
    finally:
        engine.close()


_MOST_LINES = 20
"""Prompts that are shown one by one; more are only summed up (--json has them all)."""
Row = tuple[dict[str, Any], Result, Result | None]


def _row(name: str, plain: Result, fast: Result | None) -> Row:
    dflash = fast.stats.dflash if fast else None
    row = {
        "set": name,
        "prompt_tokens": plain.stats.prompt_tokens,
        "new_tokens": plain.stats.completion_tokens,
        "tok_s_plain": round(plain.stats.decode_tokens_per_second, 2),
        "tok_s_dflash": round(fast.stats.decode_tokens_per_second, 2) if fast else None,
        "accept_length": round(dflash.accept_length, 3) if dflash else None,
        "equal_tokens": plain.token_ids == fast.token_ids if fast else None,
    }
    return row, plain, fast


def _total(rows: list[Row]) -> dict[str, Any]:
    def rate(results: list[Result]) -> float:
        seconds = sum(result.stats.decode_time for result in results)
        return round(sum(result.stats.completion_tokens for result in results) / seconds, 2) if seconds else 0.0

    fast = [result for _, _, result in rows if result is not None]
    drafted = [result.stats.dflash for result in fast if result.stats.dflash]
    steps = sum(stats.verify_steps for stats in drafted)
    return {
        "prompt_tokens": sum(row["prompt_tokens"] for row, _, _ in rows),
        "new_tokens": sum(row["new_tokens"] for row, _, _ in rows),
        "tok_s_plain": rate([plain for _, plain, _ in rows]),
        "tok_s_dflash": rate(fast) if fast else None,
        "accept_length": round(sum(s.committed_tokens for s in drafted) / steps, 3) if steps else None,
        "equal_tokens": all(row["equal_tokens"] for row, _, _ in rows) if fast else None,
        "steps_by_count": _added([stats.steps_by_count for stats in drafted]) if steps else None,
    }


def _added(counts: list[tuple[int, ...]]) -> list[int]:
    return [sum(column) for column in itertools.zip_longest(*counts, fillvalue=0)]


def _print(report: dict[str, Any]) -> None:
    columns = {
        "prompts": "set",
        "prompt": "prompt_tokens",
        "new": "new_tokens",
        "plain tok/s": "tok_s_plain",
        "DFlash tok/s": "tok_s_dflash",
        "accept length": "accept_length",
        "equal tokens": "equal_tokens",
    }
    table = Table(title=f"{report['model']} on {report['device']}", caption="rates after prefill; last line: in total")
    for title in columns:
        table.add_column(title, justify="right")
    sets = [{**total, "set": f"all of {name}"} for name, total in report["sets"].items()]
    rows = report["rows"] if len(report["rows"]) <= _MOST_LINES else []
    for row in [*rows, *(sets if len(sets) > 1 else ()), {**report["total"], "set": "all"}]:
        table.add_row(*("-" if row[key] is None else str(row[key]) for key in columns.values()))
    Console().print(table)
