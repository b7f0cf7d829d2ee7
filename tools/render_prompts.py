"""Writes the prompts of `dflash-jax bench decode` with the chat template applied, for engines that take plain text.

python tools/render_prompts.py OUT.jsonl [--model MODEL] [--prompts FILE.jsonl]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dflash_jax.bench.report import read_prompts
from dflash_jax.engine.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=Path)
    arguments = parser.parse_args()
    template = load_model(arguments.model).template
    texts = [p if isinstance(p, str) else template.render(p) for p in read_prompts(arguments.prompts)]
    arguments.out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    main()
