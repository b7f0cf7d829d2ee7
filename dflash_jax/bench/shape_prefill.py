"""`dflash-jax bench prefill --shape`: how long a big model on random 4-bit weights takes until the first token.

The whole prompt is read once without and once with PFlash, in the passes that an engine makes of it. Which tokens the
scores of random weights keep means nothing; how many are kept, and so the time, is what a keep ratio says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from dflash_jax.bench.plot import check_plot, plot_prefill
from dflash_jax.bench.report import FLOPS, environment, write
from dflash_jax.bench.shapes import TARGETS, random_programs
from dflash_jax.compress.prune import select
from dflash_jax.compress.score import QUESTION_ROWS, Sparse
from dflash_jax.console import progress_bar
from dflash_jax.control.rules import BOUNDS
from dflash_jax.engine.compilation import enable_persistent_cache
from dflash_jax.engine.programs import Programs, chunks_of, new_slots, sampling_parameters
from dflash_jax.models.config import ModelConfig
from dflash_jax.models.hf_config import from_hf
from dflash_jax.models.parameters import target_parameters
from dflash_jax.speculate.pace import PLAIN


def run(
    shape: str,
    lengths: Sequence[int],
    json_file: Path | None = None,
    plot: Path | None = None,
    *,
    keep_ratio: float | None = None,
    bsa: bool = False,
) -> dict[str, Any]:
    """Times the first token behind prompts of each length, prints a table, returns the report.

    Without a `keep_ratio` so much is kept as a new session keeps.
    """
    check_plot(plot)
    enable_persistent_cache()
    config, ratio = from_hf(TARGETS[shape]), keep_ratio or BOUNDS["relative"].start
    with progress_bar() as progress:
        progress("random weights", 0, 0)
        programs, _ = random_programs(shape, max(*lengths, Sparse().least_tokens), sparse=Sparse() if bsa else None)
        progress("programs", 0, 0)
        for length in (sum(programs.profile.chunks), *([Sparse().least_tokens] if bsa else [])):  # both chunks of each
            _row(programs, config, length + 1, ratio)
        rows = []
        for length in lengths:
            progress(f"a prompt of {length:,} tokens", len(rows), len(lengths))
            rows.append(_row(programs, config, length, ratio))
    model = f"{shape} and drafter, random w4 weights"
    report = {**environment(), "model": model, "keep_ratio": ratio, "bsa": bsa, "rows": rows}
    _print(report)
    write(json_file, report)
    plot_prefill(plot, report)
    return report


def _row(programs: Programs, config: ModelConfig, length: int, ratio: float) -> dict[str, Any]:
    ids = np.random.default_rng(length).integers(0, config.vocab_size, length).astype(np.int32)
    started = time.perf_counter()
    _first_token(programs, ids)
    plain = time.perf_counter() - started
    started = time.perf_counter()
    kept = _kept(programs, ids, ratio)
    scored = time.perf_counter() - started
    _first_token(programs, ids[kept])
    pruned = time.perf_counter() - started
    flops = FLOPS.get(jax.devices()[0].device_kind)
    return {
        "prompt_tokens": length,
        "kept_tokens": int(kept.sum()),
        "ttft_s_plain": round(plain, 3),
        "ttft_s_pflash": round(pruned, 3),
        "score_s": round(scored, 3),
        "limit_s": round(_operations(config, length) / flops, 3) if flops else None,
    }


def _first_token(programs: Programs, ids: np.ndarray) -> None:
    """Reads all tokens but the last one, and takes a step."""
    last, tables = len(ids) - 1, programs.whole_tables()
    positions = np.arange(len(ids), dtype=np.int32)
    for begin, end in chunks_of(last, programs.profile):
        programs.prefill_chunk(ids[begin:end], positions[begin:end], tables, begin)
    slots = new_slots(tables, length=last, position=last, anchor=int(ids[last]), limit=1, stop_ids=())
    programs.decode(slots, sampling_parameters(temperature=0.0), PLAIN, max_steps=1)


def _kept(programs: Programs, ids: np.ndarray, ratio: float) -> np.ndarray:
    """Which tokens the scorer keeps; the question is the last ones, which stay."""
    length, tables = len(ids), programs.whole_tables()
    positions = np.arange(length + QUESTION_ROWS, dtype=np.int32)
    reading = programs.begin_reading(tables, 0, length)
    for begin, end in chunks_of(length, programs.profile):
        rows = slice(begin, end)
        reading = programs.read_for_scoring(reading, ids[rows], positions[rows], tables, begin, begin, length)
    question = np.resize(ids[-QUESTION_ROWS:], QUESTION_ROWS)
    scores = programs.score(reading, question, positions[length:], tables, length, length)
    droppable = np.arange(length) < length - QUESTION_ROWS
    return select(scores, droppable, ratio)


def _operations(config: ModelConfig, tokens: int) -> float:
    """Of reading so many tokens: the products of layers, and scores and mixes of the pairs that attention sees."""
    products = 0.0
    for name, parameter in target_parameters(config).items():
        if name.startswith("layers.") and len(parameter.shape) == 2:
            experts = config.experts if name.endswith(("experts.gate_up", "experts.down")) else None
            share = experts.active / experts.count if experts else 1.0
            products += 2 * math.prod(parameter.shape) * share * tokens
    for layer in config.layers:
        window = min(layer.window or tokens, tokens)
        pairs = tokens * window - window * (window - 1) / 2
        products += 4 * config.num_heads * layer.head_dim * pairs
    return products


def _print(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['model']} on {report['device']}")
    for title in ("prompt", "kept", "plain TTFT s", "limit s", "PFlash TTFT s", "of it scoring", "speedup"):
        table.add_column(title, justify="right")
    for row in report["rows"]:
        speedup = f"{row['ttft_s_plain'] / row['ttft_s_pflash']:.1f}x"
        names = ("prompt_tokens", "kept_tokens", "ttft_s_plain", "limit_s", "ttft_s_pflash", "score_s")
        table.add_row(*(str(row[name] if row[name] is not None else "-") for name in names), speedup)
    Console().print(table)
