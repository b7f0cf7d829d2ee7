"""Pictures of reports. matplotlib comes with the extra `plot` and is imported only here."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Tokens per second of every prompt, plain and with DFlash, and the accept length over each pair."""
    if path is None:
        return
    figure, axes = _figure(report, "tokens per second after prefill")
    rows = report["rows"]
    places = range(len(rows))
    drafted = any(row["tok_s_dflash"] for row in rows)
    width = 0.4 if drafted else 0.8
    shift = width / 2 if drafted else 0
    plain = [row["tok_s_plain"] for row in rows]
    axes.bar([place - shift for place in places], plain, width, color=_PLAIN, label="plain")
    if drafted:
        fast = [row["tok_s_dflash"] for row in rows]
        bars = axes.bar([place + shift for place in places], fast, width, color=_FAST, label="DFlash")
        axes.bar_label(bars, [f"τ {row['accept_length']:.1f}" for row in rows], fontsize=8)
    axes.set_xticks(list(places), [str(place + 1) for place in places])
    axes.set_xlabel("prompt")
    _save(path, figure, axes)


def plot_prefill(path: Path | None, report: Mapping[str, Any]) -> None:
    """Time to the first token over prompt length, with and without PFlash."""
    if path is None:
        return
    figure, axes = _figure(report, "seconds to the first token")
    rows = sorted(report["rows"], key=lambda row: row["prompt_tokens"])
    lengths = [row["prompt_tokens"] for row in rows]
    axes.plot(lengths, [row["ttft_s_plain"] for row in rows], "o-", color=_PLAIN, label="whole prompt")
    axes.plot(lengths, [row["ttft_s_pflash"] for row in rows], "o-", color=_FAST, label="PFlash")
    axes.set_xlabel("prompt tokens")
    axes.set_ylim(bottom=0)
    _save(path, figure, axes)


def _figure(report: Mapping[str, Any], label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{report['model']} on {report['device']}", fontsize=10)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(path: Path, figure: Any, axes: Any) -> None:
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
