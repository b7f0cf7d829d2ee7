"""Every kernel against its reference and every model path, on the device that is there.

    python tools/gpu_check.py [--model MODEL | --no-model] [--json FILE]

Prints a table with the error and the time of each case beside its floor (bytes over the device's bandwidth), writes it
as JSON (to $OUT/gpu_check.json by default) and exits with status 1 if anything is wrong. CI has no GPU: run this before
a change of device code lands.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.bench.report import BANDWIDTH, environment
from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.cases import (
    LARGE_ATTENTION,
    LARGE_MATMUL,
    LARGE_SCORING,
    SMALL_ATTENTION,
    SMALL_MATMUL,
    SMALL_SCORING,
)
from pallas_kernels.quantised_matmul.api import matmul
from pallas_kernels.timing import copies_of, seconds_per_call
from pallas_kernels.token_scoring.api import token_scores

_ON_GPU = jax.default_backend() == "gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--no-model", action="store_true", help="kernels only")
    default = Path(os.environ["OUT"]) / "gpu_check.json" if "OUT" in os.environ else None
    parser.add_argument("--json", type=Path, default=default)
    arguments = parser.parse_args()
    large = _ON_GPU
    operations = (
        ("block_attention", block_attention, SMALL_ATTENTION, LARGE_ATTENTION),
        ("token_scoring", token_scores, SMALL_SCORING, LARGE_SCORING),
        ("quantised_matmul", matmul, SMALL_MATMUL, LARGE_MATMUL),
    )
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {**environment(), "command": " ".join(["python", *sys.argv]), "rows": rows}
    for name, function, small, big in operations:
        for case in [*small, *(big if large else ())]:
            rows.append(_check(name, function, case))
            print(json.dumps(rows[-1]), flush=True)
            _write(arguments.json, report)  # as it goes: a limit on the time of a run loses nothing
    if not arguments.no_model:
        from gpu_models import model_rows

        report["model"], report["model_rows"] = model_rows(arguments.model)
        _write(arguments.json, report)
    wrong = [row for row in [*rows, *report.get("model_rows", ())] if not row["ok"]]
    print(f"{len(wrong)} of {len(rows) + len(report.get('model_rows', ()))} checks failed")
    sys.exit(1 if wrong else 0)


def _write(file: Path | None, report: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _check(operation: str, function: Callable[..., Any], case: Any) -> dict[str, Any]:
    positional, keywords = case.arguments()
    kernel = functools.partial(function, **keywords, implementation="triton" if _ON_GPU else None)
    reference = functools.partial(function, **keywords, implementation="reference")
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, positional)
        expected = np.asarray(jax.jit(reference)(*wide), np.float32)
    actual = np.asarray(jax.jit(kernel)(*positional), np.float32)
    scale = float(np.abs(expected).max())
    error = float(np.abs(actual - expected).max()) / scale
    limit = 2e-2 if case.dtype == "bfloat16" else 1e-4
    first, *rest = positional
    sets = copies_of(rest, case.bytes, most=4 if _ON_GPU else 1)
    bandwidth = BANDWIDTH.get(jax.devices()[0].device_kind)
    return {
        "operation": operation,
        "case": case.name,
        "relative_error": float(f"{error:.3g}"),
        "tolerance": limit,
        "us": round(1e6 * seconds_per_call(kernel, first, sets), 1),
        "us_reference": round(1e6 * seconds_per_call(reference, first, sets), 1),
        "floor_us": round(1e6 * case.bytes / bandwidth, 2) if bandwidth else None,
        "ok": bool(np.isfinite(actual).all() and error <= limit),
    }


if __name__ == "__main__":
    main()
