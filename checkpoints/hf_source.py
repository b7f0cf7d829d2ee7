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
from checkpoints.hf_names import canonical_name, is_skipped
from checkpoints.source import Reader, Source, family
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.hf_config import drafter_from_hf, from_hf, token_ids

_DTYPES = ("F32", "F16", "BF16")


def read_folder(path: Path) -> Source:
    """The model or drafter in a folder. Raises CheckpointError or ConfigError with what is wrong in it."""
    described = _json(path / "config.json")
    if described.get("quantization_config"):
        raise CheckpointError(f"{path} is quantised already: give the folder of the original weights, or a .gguf file")
    config = _config(path, described)
    readers: dict[str, Reader] = {}
    shapes, origin, skipped = {}, {}, []
    for file in _weight_files(path):
        for own, shape in _shapes(file).items():
            if is_skipped(own, config):
                skipped.append(own)
                continue
            name = canonical_name(own, config)
            if name is None:
                raise CheckpointError(f"{file}: tensor {own} is unknown in a {family(config)} model")
            readers[name] = functools.partial(_read, file, own)
            shapes[name], origin[name] = flat_shape(shape), own
    return Source(
        path=path,
        config=config,
        shapes=shapes,
        readers=readers,
        origin=origin,
        tokenizer_json=_text(path / "tokenizer.json"),
        chat_template=_chat_template(path),
        skipped=tuple(skipped),
    )


def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The matrices of experts `[experts, out, in]` stand below each other in ours."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def _config(path: Path, described: dict[str, Any]) -> ModelConfig | DrafterConfig:
    try:
        if "dflash_config" in described:
            return drafter_from_hf(described)
        config = from_hf(described)
        generation = path / "generation_config.json"
        more = _json(generation) if generation.exists() else {}
        stops = dict.fromkeys([*config.stop_ids, *token_ids(more.get("eos_token_id"))])
        never = dict.fromkeys([*config.suppressed_ids, *token_ids(more.get("suppress_tokens"))])
        return dataclasses.replace(config, stop_ids=tuple(stops), suppressed_ids=tuple(never))
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
        values = np.asarray(tensors.get_tensor(name)).astype(np.float32)
    return values.reshape(flat_shape(values.shape))


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
