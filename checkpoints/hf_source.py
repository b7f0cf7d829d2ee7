"""Hugging Face folders: config.json, one or many safetensors files, tokenizer.json, chat template."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError, first_line
from checkpoints.expert_stacks import stack_experts
from checkpoints.hf_names import canonical_name, is_other_modality, is_selector, is_skipped, variant_of
from checkpoints.packed_weights import Tensor, unpack
from checkpoints.readers import CheckedReader, CheckpointWarning
from checkpoints.safetensors_file import StoredTensor, read_header
from checkpoints.source import Reader, Source, family, parameter_table
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.hf_config import drafter_from_hf, from_hf, is_drafter, token_ids


def read_folder(path: Path) -> Source:
    """The model or drafter in a folder. Raises CheckpointError or ConfigError with what is wrong in it."""
    described = _json(path / "config.json")
    config = _config(path, described)
    tensors, skipped = _tensors(path, described)
    readers: dict[str, Reader] = {}
    shapes, origin, table = {}, {}, parameter_table(config)
    for name, tensor in tensors.items():
        if is_skipped(name, config):
            skipped.append(tensor.origin)
            continue
        own = canonical_name(name, config)
        homeless = own is None or (own.endswith("_bias") and own not in table)
        if homeless and name.endswith(".bias") and _is_zero(tensor):  # GPTQ writes one beside every matrix
            skipped.append(tensor.origin)
            continue
        if own is None:
            raise CheckpointError(
                f"{path}: tensor {tensor.origin} is unknown in a {family(config)} model{variant_of(name, config)}"
            )
        readers[own] = CheckedReader(f"{path}: tensor {tensor.origin}", tensor.shape[0], tensor.read)
        shapes[own], origin[own] = tensor.shape, tensor.origin
    if any(is_selector(name, config) for name in tensors):
        warnings.warn(
            f"{path}: the candidate selector of DFlash 2 is left out, which is not supported; fewer proposals will be "
            "accepted",
            CheckpointWarning,
            stacklevel=2,
        )
    tokenizer = read_text(path / "tokenizer.json")
    if tokenizer is not None and isinstance(config, ModelConfig):
        check_tokenizer(path, tokenizer, config.vocab_size)
    return Source(
        path=path,
        config=config,
        shapes=shapes,
        readers=readers,
        origin=origin,
        tokenizer_json=tokenizer,
        chat_template=_chat_template(path),
        skipped=tuple(skipped),
    )


def check_tokenizer(path: Path, tokenizer_json: str, vocab_size: int) -> None:
    """Raises CheckpointError for a tokenizer that has more ids than the model has rows."""
    try:
        found = json.loads(tokenizer_json)
        vocabulary = (found.get("model") or {}).get("vocab") or {}
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        largest = max([*ids, *(token["id"] for token in found.get("added_tokens") or [])], default=-1)
        fits = largest < vocab_size
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: tokenizer.json is damaged: {first_line(error)}; fetch it again") from error
    if not fits:
        raise CheckpointError(
            f"{path}: the tokenizer has id {largest}, the model {vocab_size} rows; they do not belong together"
        )


def _tensors(path: Path, described: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(path):
        stored |= read_header(file)
    text = described.get("text_config")
    for fields in (described, text if isinstance(text, dict) else {}):
        quantisation = fields.get("quantization_config") or fields.get("compression_config")
        if quantisation:
            break
    wanted = {name: tensor for name, tensor in stored.items() if not is_other_modality(name)}
    try:
        tensors, skipped = unpack(path, wanted, quantisation)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: quantization_config is damaged or unusual: {first_line(error)}") from error
    tensors = stack_experts(path, tensors)
    scalars = [tensor.origin for tensor in tensors.values() if not tensor.shape]
    if scalars:
        raise CheckpointError(f"{path}: tensor {scalars[0]} is a single number, which no model here has")
    return tensors, [name for name in stored if name not in wanted] + skipped


def _is_zero(tensor: Tensor) -> bool:
    return not tensor.read(0, tensor.shape[0]).any()


def _config(path: Path, described: dict[str, Any]) -> ModelConfig | DrafterConfig:
    try:
        if is_drafter(described):
            return drafter_from_hf(described)
        config = from_hf(described)
        generation = path / "generation_config.json"
        more = _json(generation) if generation.exists() else {}
        stops = dict.fromkeys([*config.stop_ids, *token_ids(more, "eos_token_id", generation.name)])
        never = dict.fromkeys([*config.suppressed_ids, *token_ids(more, "suppress_tokens", generation.name)])
        return dataclasses.replace(config, stop_ids=tuple(stops), suppressed_ids=tuple(never))
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from error


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


def _chat_template(path: Path) -> str | None:
    template = read_text(path / "chat_template.jinja")
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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return value


def read_text(file: Path) -> str | None:
    """A text that may be absent. Raises CheckpointError for one that cannot be read."""
    try:
        return file.read_text(encoding="utf-8") if file.exists() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {first_line(error)}") from error
