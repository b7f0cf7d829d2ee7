"""Every model path and every kernel against its reference, on the device that is there.

    python tools/gpu_check.py [--only models|kernels] [--operation NAME]... [--model MODEL] [--json FILE]

Prints each check when it is done: a kernel's error, and its time beside its floor (as `dflash-jax bench kernels` does).
Writes all so far as JSON (to $OUT/gpu_check.json by default), so that a limit on the time of a run loses nothing; the
model paths come first, because the kernels take most of it. Exits with status 1 if anything is wrong. CI has no GPU:
run this before a change of device code lands. `--operation`, which may be repeated, checks the kernels of some
operations alone.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflash_jax.bench.kernels import cases
from dflash_jax.bench.report import device_limits, environment, write
from dflash_jax.engine.loading import load_model
from dflash_jax.engine.request import RequestError
from pallas_kernels.operations import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["models", "kernels"], help="one half of the checks")
    parser.add_argument(
        "--operation", action="append", metavar="NAME", help="kernels of this operation; may be repeated"
    )
    parser.add_argument("--model", type=Path, help="the model of the model paths; the default model without it")
    default = Path(os.environ["OUT"]) / "gpu_check.json" if "OUT" in os.environ else None
    parser.add_argument("--json", type=Path, default=default)
    arguments = parser.parse_args()
    if arguments.operation and (arguments.only == "models" or arguments.model):
        parser.error("--operation is about kernels: leave out --only models and --model")
    only = "kernels" if arguments.operation else arguments.only
    try:
        todo = [each for name in arguments.operation or [None] for each in cases(name)] if only != "models" else []
    except RequestError as error:
        parser.error(str(error))

    started = time.monotonic()
    report: dict[str, Any] = {**environment(), "command": " ".join(["python", *sys.argv]), "rows": [], "model_rows": []}
    checks = itertools.chain(
        (("model_rows", row) for row in _models(arguments.model, report)) if only != "kernels" else (),
        (("rows", row) for row in measure(todo, device_limits())),
    )
    for kind, row in checks:
        report[kind].append(row)
        print(f"[{_progress(report, len(todo))}, {time.monotonic() - started:.0f} s] {json.dumps(row)}", flush=True)
        write(arguments.json, report)
    rows = [*report["model_rows"], *report["rows"]]
    wrong = [row for row in rows if not row["ok"]]
    print(f"{len(wrong)} of {len(rows)} checks failed")
    sys.exit(1 if wrong else 0)


def _models(path: Path | None, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from gpu_models import model_rows

    model = load_model(path)
    report["model"] = model.model_id
    yield from model_rows(model)
    del model
    gc.collect()  # engines are cycles; the memory is for the kernels now


def _progress(report: dict[str, Any], cases: int) -> str:
    """How far the run is. A case may have a row for each of its kernels."""
    if not report["rows"]:
        return f"model path {len(report['model_rows'])}"
    done = {(row["operation"], row["case"]) for row in report["rows"]}
    return f"case {len(done)} of {cases}"


if __name__ == "__main__":
    main()
