"""`dflash-jax bench prefill`: time to the first token with and without PFlash, over a ladder of prompt lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dflash_jax.bench.haystack import NEEDLES, conversation
from dflash_jax.bench.plot import check_plot, plot_prefill
from dflash_jax.bench.report import Prompt, environment, read_prompts, write
from dflash_jax.compress.prune import Positions
from dflash_jax.console import progress_bar
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import load_model
from dflash_jax.engine.request import PflashScope, Result

_LADDER = (1000, 2000, 4000, 6000, 8000, 16_000, 32_000, 64_000, 128_000)
_ANSWER_TOKENS = 24


def run(
    model: Path | None,
    *,
    prompts: Path | None = None,
    json_file: Path | None = None,
    plot: Path | None = None,
    scorer: Path | None = None,
    keep_ratio: float | None = None,
    pflash_scope: PflashScope = "agent",
    bsa: bool = False,
    context_length: int | None = None,
    positions: Positions = "compact",
) -> dict[str, Any]:
    """Answers prompts with PFlash off and on, prints a table, returns the report.

    Without a prompts file the prompts are long documents with a hidden fact, and the table says whether it was found.
    """
    check_plot(plot)
    with progress_bar() as progress:
        loaded = load_model(model, scorer=scorer, progress=progress)
        options: dict[str, Any] = {"context_length": context_length, "max_sessions": 1}
        pruning = {"keep_ratio": keep_ratio, "pflash_scope": pflash_scope, "positions": positions, "bsa": bsa}
        plain = Engine(loaded, pflash="off", **options)
        fast = Engine(loaded, pflash="on", **pruning, **options)
        with contextlib.closing(plain), contextlib.closing(fast):
            plain.warm_up(progress)
            fast.warm_up(progress)
            rows = []
            cases = list(_cases(plain, prompts))
            for index, (chat, answer) in enumerate(cases):
                progress("prompts", index, len(cases))
                one, two = (engine.generate(chat, max_tokens=_ANSWER_TOKENS) for engine in (plain, fast))
                rows.append(_row(one, two, answer))
            progress("prompts", len(cases), len(cases))
    report = {**environment(), "model": loaded.model_id, "rows": rows}
    _print(report)
    write(json_file, report)
    plot_prefill(plot, report)
    return report


def _cases(engine: Engine, prompts: Path | None) -> Iterator[tuple[Prompt, str | None]]:
    """Prompts, each with what its answer must contain if that is known."""
    if prompts is not None:
        for prompt in read_prompts(prompts):
            yield prompt, None
        return
    for index, tokens in enumerate(length for length in _LADDER if length < engine.context_length):
        needle = NEEDLES[index % len(NEEDLES)]
        yield _fitted(engine, tokens, needle_index=index), needle.answer


def _fitted(engine: Engine, tokens: int, *, needle_index: int) -> Prompt:
    """A conversation of about, and not over, so many tokens."""
    needle = NEEDLES[needle_index % len(NEEDLES)]
    characters = 4 * tokens
    while True:
        chat = conversation(characters, needle, depth=0.3 + 0.1 * (needle_index % 5), offset=40_000 * needle_index)
        count = engine.count_tokens(chat)
        if count <= tokens:
            return chat
        characters = int(characters * tokens / count * 0.99)


def _row(plain: Result, fast: Result, answer: str | None) -> dict[str, Any]:
    pflash = fast.stats.pflash
    return {
        "prompt_tokens": plain.stats.prompt_tokens,
        "kept_tokens": pflash.kept_tokens if pflash else fast.stats.prompt_tokens,
        "ttft_s_plain": round(plain.stats.time_to_first_token, 3),
        "ttft_s_pflash": round(fast.stats.time_to_first_token, 3),
        "score_s": round(pflash.score_ms / 1000, 3) if pflash else 0.0,
        "found_plain": None if answer is None else answer in plain.text,
        "found_pflash": None if answer is None else answer in fast.text,
    }


def _print(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['model']} on {report['device']}")
    for title in (
        "prompt",
        "kept",
        "plain TTFT s",
        "PFlash TTFT s",
        "of it scoring",
        "speedup",
        "fact found plain / PFlash",
    ):
        table.add_column(title, justify="right")
    for row in report["rows"]:
        found = "-" if row["found_plain"] is None else f"{row['found_plain']} / {row['found_pflash']}"
        speedup = row["ttft_s_plain"] / row["ttft_s_pflash"]
        cells = (row["prompt_tokens"], row["kept_tokens"], row["ttft_s_plain"], row["ttft_s_pflash"], row["score_s"])
        table.add_row(*map(str, cells), f"{speedup:.2f}x", found)
    Console().print(table)
