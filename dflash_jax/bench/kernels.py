"""`dflash-jax bench kernels`: every operation beside its floor, its reference as XLA compiles it, and its error."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from dflash_jax.bench.report import device_limits, environment, write
from dflash_jax.console import progress_bar
from dflash_jax.engine.request import RequestError
from pallas_kernels.block_attention import bench as attention_sweep
from pallas_kernels.operations import OPERATIONS, Case, Operation, measure
from pallas_kernels.quantised_matmul import bench as matmul_sweep

_SWEEP_SECONDS = 120.0
_SWEEPS = {"block_attention": attention_sweep.sweep, "quantised_matmul": matmul_sweep.sweep}


def run(*, json_file: Path | None = None, operation: str | None = None, tune: bool = False) -> dict[str, Any]:
    """Measures the named cases, prints a table, returns the report; with `tune`, sweeps instead and writes tuned.json.

    Raises RequestError for an operation that is not there, and for `tune` where no kernel can run.
    """
    if tune:
        return _tune(json_file, operation)
    todo = cases(operation)
    rows: list[dict[str, Any]] = []
    report = {**environment(), "rows": rows}
    with progress_bar() as progress:
        for row in measure(todo, device_limits()):
            rows.append(row)
            progress(f"{row['operation']}: {row['case']}", len(rows), len(todo))
            write(json_file, report)  # as it goes: a limit on the time of a run loses nothing
        progress("measured", len(todo), len(todo))
    _print(report)
    return report


def cases(operation: str | None = None) -> list[tuple[Operation, Case]]:
    """What is measured on this device: small cases, and on a GPU the large ones too.

    Raises RequestError for an operation that is not there.
    """
    chosen = [each for each in OPERATIONS if operation in (None, each.name)]
    if not chosen:
        names = ", ".join(each.name for each in OPERATIONS)
        raise RequestError(f"there is no operation {operation!r} to measure: use one of {names}")
    large = jax.default_backend() == "gpu"
    return [(each, case) for each in chosen for case in [*each.small, *(each.large if large else ())]]


def _print(report: dict[str, Any]) -> None:
    table = Table(title=f"Operations on {report['device']}")
    table.add_column("operation", no_wrap=True)
    table.add_column("case")
    for title in ("µs", "floor µs", "of floor", "XLA µs", "error"):
        table.add_column(title, justify="right")
    for row in report["rows"]:
        if "error" in row:
            table.add_row(row["operation"], row["case"], *"----", row["error"])
            continue
        share = "-" if row["of_floor"] is None else f"{100 * row['of_floor']:.0f} %"
        error = f"{row['relative_error']:.1e}{'' if row['ok'] else ' TOO LARGE'}"
        cells = (row["us"], row["floor_us"] or "-", share, row["us_reference"], error)
        table.add_row(row["operation"], row["case"], *map(str, cells))
    console = Console()
    console.print(table)
    if device_limits() is None:
        console.print("Floors are unknown: nobody has measured what this device can do at best.")


def _tune(json_file: Path | None, operation: str | None) -> dict[str, Any]:
    if operation not in (None, *_SWEEPS):
        raise RequestError(f"{operation} has nothing to tune: only {' and '.join(_SWEEPS)} have")
    if jax.default_backend() != "gpu":
        raise RequestError("tuning needs a GPU: kernels do not run on this device")
    chosen = [sweep for name, sweep in _SWEEPS.items() if operation in (None, name)]
    rows: list[dict[str, Any]] = []
    report = {**environment(), "rows": rows}
    limits = device_limits()
    for sweep in chosen:
        for case, row in sweep(time.perf_counter() + _SWEEP_SECONDS / len(chosen)):
            floor = 1e6 * limits.seconds(case) if limits else None
            rows.append({**row, "floor_us": round(floor, 2) if floor else None})
            write(json_file, report)
    Console().print(f"{len(rows)} configs are in tuned.json of {' and '.join([operation] if operation else _SWEEPS)}")
    return report
