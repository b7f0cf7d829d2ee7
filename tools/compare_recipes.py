"""Trains small drafters that differ in one thing each and writes what each brought: the table of docs/training.md.

    python tools/compare_recipes.py --samples run/samples.npz --seconds 60 --json recipes.json

Every GPU takes one recipe at a time, or several that share it (--at-once): then --steps says how long they learn, as
their times say little. Samples are cut to 512 tokens, so that each recipe is one program to compile; all recipes learn
from the same samples and are scored on the same ones that were held out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import tempfile
from pathlib import Path

from dflash_jax.bench.report import environment
from dflash_jax.train.samples import LENGTHS, Samples

RECIPES = {
    "the default": "",
    "AdamW": "--optimiser adamw",
    "decay instead of D-PACE": "--weighting decay",
    "the target's distribution": "--labels target",
    "no path selector": "--path-rank 0",
    "two-tap convolution": "--convolution",
    "2 layers": "--layers 2",
    "3 layers": "--layers 3",
    "5 layers": "--layers 5",
    "3 features": "--features 3",
    "6 features": "--features 6",
    "blocks of 8": "--block-size 8",
    "twice the anchors": "--tokens-per-anchor 4",
    "a window of 256": "--window 256",
    "twice the rate": "--rate 0.002",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="numbers of the GPUs to use")
    parser.add_argument("--at-once", type=int, default=1, help="recipes that share a GPU")
    parser.add_argument("--model", default="default")
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / "samples.npz"
        Samples.join([Samples.load(file) for file in arguments.samples]).cut(LENGTHS[0]).save(cut)
        idle: queue.Queue[int] = queue.Queue()
        for gpu in arguments.gpus * arguments.at_once:
            idle.put(gpu)

        def train(name: str) -> dict[str, object]:
            gpu = idle.get()
            try:
                row = {"recipe": name, "options": RECIPES[name], **one(arguments, cut, Path(folder) / name, name, gpu)}
            finally:
                idle.put(gpu)
            print(json.dumps(row), flush=True)
            return row

        with concurrent.futures.ThreadPoolExecutor(idle.qsize()) as pool:
            rows = list(pool.map(train, arguments.only))
    command = " ".join(["python", "tools/compare_recipes.py", *sys.argv[1:]])
    report = {**environment(), "command": command, "model": arguments.model, "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def one(arguments: argparse.Namespace, samples: Path, out: Path, name: str, gpu: int) -> dict[str, object]:
    """What `train-drafter` says of one recipe."""
    options = [*RECIPES[name].split(), "--samples", str(samples), "--minutes", str(arguments.seconds / 60)]
    options += ["--steps", str(arguments.steps)] if arguments.steps else []
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(round(0.9 / arguments.at_once, 3))}
    done = subprocess.run(
        [sys.executable, "-m", "dflash_jax", "train-drafter", arguments.model, str(out), *options],
        env={**os.environ, **memory, "CUDA_VISIBLE_DEVICES": str(gpu)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    return {key: report[key] for key in ("held_out_accept_length", "steps", "seconds", "tokens_per_second")}


if __name__ == "__main__":
    main()
