"""Pictures of reports. matplotlib comes with the extra `plot` and is imported only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dflash_jax.engine.request import RequestError

_PLAIN, _FAST = "#9aa5b1", "#2f6fed"


def check_plot(path: Path | None) -> None:
    """Raises RequestError when a picture was asked for that could not be drawn at the end of a long run."""
    if path is None:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError("--plot needs matplotlib: install dflash-jax[plot]") from error
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise RequestError(f"--plot {path}: the name must end in .png, .svg or .pdf")


def plot_decode(path: Path | None, report: Mapping[str, Any]) -> None:
    """Tokens per second, plain and with DFlash, and the accept length over each pair: of every prompt, or of every set.

    Beside it, where blocks were drafted, how many tokens their steps committed.
    """
    if path is None:
        return
    sets = report.get("sets") or {}
    bars = sets if len(sets) > 1 else {str(place + 1): row for place, row in enumerate(report["rows"])}
    shares = {name: row["steps_by_count"] for name, row in sets.items() if row.get("steps_by_count")}
    figure, (axes, *beside) = _figure(report, "tokens per second after prefill", panels=2 if shares else 1)
    rows, places = list(bars.values()), range(len(bars))
    drafted = any(row["tok_s_dflash"] for row in rows)
    width = 0.4 if drafted else 0.8
    shift = width / 2 if drafted else 0
    plain = [row["tok_s_plain"] for row in rows]
    axes.bar([place - shift for place in places], plain, width, color=_PLAIN, label="plain")
    if drafted:
        fast = [row["tok_s_dflash"] or 0.0 for row in rows]
        pairs = axes.bar([place + shift for place in places], fast, width, color=_FAST, label="DFlash")
        axes.bar_label(pairs, [f"τ {row['accept_length'] or 0:.1f}" for row in rows], fontsize=8)
    axes.set_xticks(list(places), list(bars))
    axes.set_xlabel("prompts" if bars is sets else "prompt")
    for axis in beside:
        _draw_shares(axis, shares)
    _save(path, figure, axes)


def _draw_shares(axes: Any, shares: Mapping[str, Sequence[int]]) -> None:
    for name, steps in shares.items():
        total = sum(steps)
        axes.plot(range(1, len(steps)), [count / total for count in steps[1:]], "o-", markersize=3, label=name)
    axes.set_xlabel("tokens committed by a step")
    axes.set_ylabel("share of steps")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def plot_prefill(path: Path | None, report: Mapping[str, Any]) -> None:
    """Time to the first token over prompt length, with and without PFlash."""
    if path is None:
        return
    figure, (axes,) = _figure(report, "seconds to the first token")
    rows = sorted(report["rows"], key=lambda row: row["prompt_tokens"])
    lengths = [row["prompt_tokens"] for row in rows]
    axes.plot(lengths, [row["ttft_s_plain"] for row in rows], "o-", color=_PLAIN, label="whole prompt")
    axes.plot(lengths, [row["ttft_s_pflash"] for row in rows], "o-", color=_FAST, label="PFlash")
    axes.set_xlabel("prompt tokens")
    axes.set_ylim(bottom=0)
    _save(path, figure, axes)


def _figure(report: Mapping[str, Any], label: str, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 4.5 * panels, 3.6), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.suptitle(f"{report['model']} on {report['device']}", fontsize=10)
    axes[0].set_ylabel(label)
    axes[0].spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(path: Path, figure: Any, axes: Any) -> None:
    axes.margins(y=0.2)
    axes.legend(frameon=False, loc="upper left", ncols=2)
    figure.savefig(path, dpi=150)
