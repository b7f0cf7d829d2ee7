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
from checkpoints.hf_source import canonical_name
from checkpoints.random_models import random_drafter
from dflash_jax.models.config import ModelConfig
from dflash_jax.models.hf_config import default_target_layers, drafter_from_hf

_NAMES = ("fc.weight", "hidden_norm.weight", "norm.weight")
_PARTS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"self_attn.{name}_norm.weight" for name in "qk"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    target = checkpoints.load(arguments.model or checkpoints.default_model()).config
    if not isinstance(target, ModelConfig):
        raise SystemExit(f"{arguments.model} is not a target")
    layer = target.layers[0]
    description = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": target.hidden_size,
        "intermediate_size": layer.mlp_width,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "rms_norm_eps": target.norm_eps,
        "rope_theta": layer.rope.theta,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
        "block_size": 16,
        "dflash_config": {"mask_token_id": 0, "target_layer_ids": list(default_target_layers(target.num_layers, 3))},
    }
    parameters = random_drafter(drafter_from_hf(description))
    names = [*_NAMES, *(f"layers.{index}.{part}" for index in range(arguments.layers) for part in _PARTS)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    tensors = {name: np.asarray(parameters[str(canonical_name(name))]) for name in names}
    save_file(tensors, arguments.out / "model.safetensors")
    print(f"{arguments.out} holds {sum(tensor.size for tensor in tensors.values()) / 1e6:.1f}M random parameters")


if __name__ == "__main__":
    main()
