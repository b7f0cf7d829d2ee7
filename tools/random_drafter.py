"""Writes a DFlash drafter of random weights for a model, in z-lab's layout.

It proposes nonsense, costs what a real one costs.

    python tools/random_drafter.py OUT [--model MODEL] [--layers 2]

With it `dflash-jax bench decode --drafter OUT` shows the worst case: every proposal is rejected and the tokens are the
same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import checkpoints
from checkpoints.hf_names import drafter_name
from checkpoints.random_models import random_drafter
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.hf_config import default_target_layers, drafter_to_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    target = checkpoints.load(arguments.model or checkpoints.default_model()).config
    if not isinstance(target, ModelConfig):
        raise SystemExit(f"{arguments.model} is not a target")
    config = DrafterConfig.beside(
        target,
        block_size=16,
        mask_id=0,
        target_layers=default_target_layers(target.num_layers, 3),
        windows=(None,) * arguments.layers,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(drafter_to_hf(config), indent=1) + "\n", encoding="utf-8")
    tensors = {drafter_name(ours): np.asarray(value) for ours, value in random_drafter(config).items()}
    save_file(tensors, arguments.out / "model.safetensors")
    print(f"{arguments.out} holds {sum(tensor.size for tensor in tensors.values()) / 1e6:.1f}M random parameters")


if __name__ == "__main__":
    main()
