"""Hugging Face folders: config.json, one or many safetensors files, tokenizer.json, chat template."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from checkpoints.errors import CheckpointError
from checkpoints.source import Reader, Source
from dflash_jax.models.config import DrafterConfig, ModelConfig, drafter_from_hf, from_hf

_TOP = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
    "fc.weight": "feature_projection",
    "hidden_norm.weight": "feature_norm",
    "norm.weight": "final_norm",
}
_LAYER = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    **{f"self_attn.{name}_proj.weight": f"attention.{name}" for name in "qkvo"},
    **{f"self_attn.{name}_proj.bias": f"attention.{name}_bias" for name in "qkv"},
    **{f"self_attn.{name}_norm.weight": f"attention.{name}_norm" for name in "qk"},
    **{f"mlp.{name}_proj.weight": f"mlp.{name}" for name in ("gate", "up", "down")},
}
_DTYPES = ("F32", "F16", "BF16")
_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that hold nothing that the config does not say."""


def read_folder(path: Path) -> Source:
    """The model or drafter in a folder. Raises CheckpointError or ConfigError with what is wrong in it."""
    described = _json(path / "config.json")
    if described.get("quantization_config"):
        raise CheckpointError(f"{path} is quantised already: give the folder of the original weights, or a .gguf file")
    config = _config(path, described)
    readers: dict[str, Reader] = {}
    shapes, origin = {}, {}
    for file in _weight_files(path):
        for own, shape in _shapes(file).items():
            if own.endswith(_IGNORED):
                continue
            name = canonical_name(own)
            if name is None:
                raise CheckpointError(
                    f"{file}: tensor {own} is unknown; supported are llama, qwen3 and DFlash drafters"
                )
            if name == "lm_head" and isinstance(config, ModelConfig) and config.tied_embeddings:
                continue  # some tied checkpoints store the matrix twice
            readers[name] = functools.partial(_read, file, own)
            shapes[name], origin[name] = shape, own
    return Source(path, config, shapes, readers, origin, _text(path / "tokenizer.json"), _chat_template(path))


def _config(path: Path, described: dict[str, Any]) -> ModelConfig | DrafterConfig:
    try:
        if "dflash_config" in described:
            return drafter_from_hf(described)
        config = from_hf(described)
        generation = path / "generation_config.json"
        stops = _json(generation).get("eos_token_id") if generation.exists() else None
        more = stops if isinstance(stops, list) else [] if stops is None else [stops]
        return dataclasses.replace(config, stop_ids=tuple(dict.fromkeys([*config.stop_ids, *map(int, more)])))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from error


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise CheckpointError(f"{path}: {missing[0]}, named in {index.name}, is missing; fetch it too")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} holds no .safetensors file: give a Hugging Face folder, a converted folder or a .gguf file"
        )
    return files


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safetensors.safe_open(str(file), framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except Exception as error:  # safetensors fails in many ways on damaged files
        raise CheckpointError(
            f"{file} is damaged or truncated: {str(error).splitlines()[0]}; fetch it again"
        ) from error
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has dtype {dtype}; supported: {', '.join(_DTYPES)}")
    return shapes


def _read(file: Path, name: str) -> np.ndarray:
    import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which safetensors hands out)

    with safetensors.safe_open(str(file), framework="numpy") as tensors:
        return np.asarray(tensors.get_tensor(name)).astype(np.float32)


def canonical_name(name: str) -> str | None:
    """Our name for a tensor of a Hugging Face or z-lab checkpoint; None for one that has no place in our models."""
    if name in _TOP:
        return _TOP[name]
    prefix, _, rest = name.removeprefix("model.").partition(".")
    index, _, rest = rest.partition(".")
    return f"layers.{index}.{_LAYER[rest]}" if prefix == "layers" and index.isdigit() and rest in _LAYER else None


def _chat_template(path: Path) -> str | None:
    template = _text(path / "chat_template.jinja")
    if template is not None:
        return template
    file = path / "tokenizer_config.json"
    found = _json(file).get("chat_template") if file.exists() else None
    if isinstance(found, list):  # several named templates
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return value


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None
