"""What the goldens of targets and drafters share: random weights that show mistakes, and the files of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Matrices of unit gain and norms far from one: the small values that libraries draw would hide a wrong RoPE."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
        for parameter in [*model.parameters(), *scalars]:
            if parameter.ndim == 1:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5, generator=generator))
            else:
                gain = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.empty_like(parameter).normal_(0, gain, generator=generator))
    return model.eval()


def write(
    folder: Path,
    model: torch.nn.Module,
    config: dict[str, object],
    *,
    rename: Callable[[str], str] = str,
    others: Mapping[str, torch.Tensor] | None = None,
    **expected: np.ndarray,
) -> None:
    """The model in its publisher's layout and the arrays that the reference computed.

    `others` are tensors that a text model must leave alone.
    """
    seen, tensors = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied head is stored once, as publishers do
            seen.add(tensor.data_ptr())
            tensors[rename(name)] = tensor.contiguous()
    save_file(tensors | dict(others or {}), folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(
        {key: value for key, value in config.items() if key != "transformers_version"}, indent=1, sort_keys=True
    )
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(folder / "expected.npz", **expected)
