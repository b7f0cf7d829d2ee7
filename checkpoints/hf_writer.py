"""Writing a drafter as a Hugging Face folder in z-lab's layout, which any engine with DFlash can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from checkpoints.hf_names import drafter_name
from dflash_jax.models.config import DrafterConfig
from dflash_jax.models.hf_config import drafter_to_hf

_FILE_BYTES = 15 << 20
"""Of tensors in one file: small enough for a repository that refuses files over 16 MiB."""


def write_drafter(out: Path, config: DrafterConfig, parameters: Mapping[str, np.ndarray]) -> None:
    """config.json, bf16 weights in as many files as they need, and their index; replaces what `out` held of these.

    `parameters` go by the names of `models.parameters.drafter_parameters`.
    """
    out.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for ours, value in parameters.items():
        tensor = np.ascontiguousarray(np.asarray(value).astype(ml_dtypes.bfloat16))
        if ours.endswith("convolution.taps"):
            tensor = tensor.reshape(2, 2, -1)  # [in front or behind, own row or left, channels]
        if used + tensor.nbytes > _FILE_BYTES and files[-1]:
            files.append({})
            used = 0
        files[-1][drafter_name(ours)] = tensor
        used += tensor.nbytes
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, out / f"{name}.new", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    for old in set(out.glob("model*.safetensors")) - {out / name for name in weight_map.values()}:
        old.unlink()
    for name in set(weight_map.values()):
        (out / f"{name}.new").replace(out / name)
    total = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (out / "config.json").write_text(json.dumps(drafter_to_hf(config), indent=1) + "\n", encoding="utf-8")
