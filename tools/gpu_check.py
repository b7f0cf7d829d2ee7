"""Every kernel against its reference and every model path, on the device that is there.

    python tools/gpu_check.py [--model MODEL | --no-model] [--json FILE]

Prints the error and the time of each case beside its floor (as `dflash-jax bench kernels` does), writes them
as JSON (to $OUT/gpu_check.json by default) and exits with status 1 if anything is wrong. CI has no GPU: run this before
a change of device code lands.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from dflash_jax.bench.kernels import cases
from dflash_jax.bench.report import device_limits, environment, write
from pallas_kernels.operations import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--no-model", action="store_true", help="kernels only")
    default = Path(os.environ["OUT"]) / "gpu_check.json" if "OUT" in os.environ else None
    parser.add_argument("--json", type=Path, default=default)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {**environment(), "command": " ".join(["python", *sys.argv]), "rows": rows}
    for row in measure(cases(), device_limits()):
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
        write(arguments.json, report)  # as it goes: a limit on the time of a run loses nothing
    if not arguments.no_model:
        from gpu_models import model_rows

        report["model"], report["model_rows"] = model_rows(arguments.model)
        write(arguments.json, report)
    wrong = [row for row in [*rows, *report.get("model_rows", ())] if not row["ok"]]
    print(f"{len(wrong)} of {len(rows) + len(report.get('model_rows', ()))} checks failed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
