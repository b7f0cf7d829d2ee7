"""Writes tests/goldens again from the reference implementations: `make goldens`.

Every golden is a folder with a tiny random model in the layout of its publisher (config.json, model.safetensors) and
`expected.npz`, what the reference computes with it in f32 on a CPU. Seeds are fixed, so a second run on the same
versions of torch and transformers writes the same bytes; run it only to add a golden, and look at `git diff --stat`
afterwards: an old golden that changed means that a reference changed its mind.

`make goldens ARGS="qwen3 drafter_full"` writes only those.
"""

from __future__ import annotations

import sys
from pathlib import Path

import golden_drafters
import golden_targets

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
MAKERS = {**golden_targets.MAKERS, **golden_drafters.MAKERS}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        print(f"unknown goldens {', '.join(unknown)}; known: {', '.join(MAKERS)}", file=sys.stderr)
        return 2
    for name in names or MAKERS:
        folder = GOLDENS / name
        folder.mkdir(parents=True, exist_ok=True)
        MAKERS[name](folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
