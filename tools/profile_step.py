"""What a decoding step spends its time on, kernel by kernel: the shares that docs/kernels.md shows.

    python tools/profile_step.py --json bench/results/h100-smollm2-profile.json
    python tools/profile_step.py --shape gemma4-31b --context 4096      # random weights

Records a few visits of plain steps and of blocks with JAX's profiler and adds up the device's events by name; XLA's
names are shortened to what they begin with. On a CPU it shows what the host's threads do, to try it out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from dflash_jax.bench.report import environment
from dflash_jax.bench.shapes import TARGETS, random_programs, slots_at
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import load_model
from dflash_jax.engine.programs import Programs, sampling_parameters
from dflash_jax.speculate.pace import PLAIN
from dflash_jax.speculate.step import Slots

VISITS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path)
    parser.add_argument("--drafter", type=Path)
    what.add_argument("--shape", choices=TARGETS, help="of a big model on random weights, instead of --model")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {**environment(), "command": " ".join(["python", *sys.argv]), "kinds": []}
    with programs_of(arguments) as programs:
        for rows in (PLAIN, *programs.block_rows):
            kind = profile(programs, rows, arguments.context)
            report["kinds"].append(kind)
            show(kind)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@contextmanager
def programs_of(arguments: argparse.Namespace) -> Iterator[Programs]:
    """What an engine runs for a model, or for a shape on random weights."""
    if arguments.shape:
        yield random_programs(arguments.shape, arguments.context)[0]
        return
    engine = Engine(load_model(arguments.model, drafter=arguments.drafter), dflash="on", pflash="off")
    engine.warm_up()
    try:
        yield engine._shared.programs
    finally:
        engine.close()


def profile(programs: Programs, rows: int, context: int) -> dict[str, Any]:
    """Events of a few visits, per step; the first visit compiles and is not among them."""
    steps_of(programs, slots_at(programs, context), rows)
    slots, steps = [slots_at(programs, context) for _ in range(VISITS)], 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for each in slots:
                steps += steps_of(programs, each, rows)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        planes = list(data.planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")] or planes
        seconds: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for plane in devices:
            for line in plane.lines:
                if plane.name.startswith("/device:") and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    name = re.sub(r"[._]*\d+.*$", "", event.name).strip("_") or event.name
                    seconds[name] += event.duration_ns / 1e9
                    counts[name] += 1
    busy = sum(seconds.values()) or 1.0
    rows_of = sorted(seconds, key=seconds.__getitem__, reverse=True)
    return {
        "kind": f"block of {rows}" if rows else "plain step",
        "steps": steps,
        "busy_us": round(1e6 * busy / steps, 1),
        "kernels": round(sum(counts.values()) / steps, 1),
        "operations": [
            {
                "name": name,
                "us": round(1e6 * seconds[name] / steps, 2),
                "calls": round(counts[name] / steps, 2),
                "share": round(seconds[name] / busy, 4),
            }
            for name in rows_of[:40]
        ],
    }


def steps_of(programs: Programs, slots: Slots, rows: int) -> int:
    """Steps of one visit."""
    visit, _ = programs.decode(slots, sampling_parameters(temperature=0.0), rows, max_steps=16)
    return int(visit.steps)


def show(kind: dict[str, Any]) -> None:
    print(f"{kind['kind']}: {kind['busy_us']} us in {kind['kernels']} events")
    for row in kind["operations"][:15]:
        print(f"  {100 * row['share']:5.1f} %  {row['us']:8.1f} us  {row['calls']:7.1f} x  {row['name']}")


if __name__ == "__main__":
    main()
