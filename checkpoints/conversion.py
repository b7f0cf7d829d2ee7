"""Reading any checkpoint and converting it: what `dflash-jax convert`, `inspect` and the engine call."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.errors import CheckpointError
from checkpoints.formats import check_format, encode
from checkpoints.gguf_source import read_gguf
from checkpoints.hf_source import read_folder
from checkpoints.source import Source, family, parameter_table
from checkpoints.store import is_converted, new_folder, read_description, read_weights, write_texts, write_weights
from dflash_jax.models.config import DrafterConfig, ModelConfig
from pallas_kernels.quantised_matmul.api import Weight

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network in memory. `parameters` go by canonical names; `tokenizer_json` and `chat_template` are texts."""

    role: str
    config: ModelConfig | DrafterConfig
    weights_format: str
    parameters: dict[str, Weight]
    tokenizer_json: str | None
    chat_template: str | None


def convert(
    source: Path,
    out: Path,
    *,
    weights: str = "bf16",
    group_size: int = 32,
    role: str = "target",
    progress: Progress | None = None,
) -> None:
    """Writes the converted folder `out` from a Hugging Face folder or a .gguf file.

    Raises CheckpointError or ConfigError, and then leaves nothing behind.
    """
    check_format(weights)
    opened = _open(Path(source))
    if isinstance(opened.config, DrafterConfig) != (role == "drafter"):
        raise CheckpointError(f"{source} holds a {family(opened.config)}: --role {role} does not fit")
    opened.check()
    with new_folder(Path(out)) as folder:
        parameters = {}
        total = len(opened.table)
        for index, (name, parameter, values) in enumerate(opened.read()):
            if progress:
                progress(f"converting to {weights}", index, total)
            parameters[name] = encode(name, parameter, values, weights, group_size)
        if progress:
            progress("writing weights", total, total)
        write_weights(folder, parameters)
        facts = {"role": role, "weights": weights, "group_size": group_size, "source": Path(source).name}
        write_texts(folder, opened.config, facts, opened.tokenizer_json, opened.chat_template)


def load(path: Path, *, weights: str = "f32") -> Checkpoint:
    """A converted folder, or a Hugging Face folder or .gguf file straight into the format `weights`.

    Raises CheckpointError or ConfigError with what is wrong and what to do.
    """
    path = Path(path)
    if is_converted(path):
        description, config = read_description(path)
        parameters = read_weights(path, config, description["weights"], description["group_size"])
        return Checkpoint(
            role=description["role"],
            config=config,
            weights_format=description["weights"],
            parameters=parameters,
            tokenizer_json=_text(path / "tokenizer.json"),
            chat_template=_text(path / "chat_template.jinja"),
        )
    check_format(weights)
    opened = _open(path)
    opened.check()
    parameters = {
        name: jax.tree.map(jnp.asarray, encode(name, parameter, values, weights, 32))
        for name, parameter, values in opened.read()
    }
    role = "drafter" if isinstance(opened.config, DrafterConfig) else "target"
    return Checkpoint(role, opened.config, weights, parameters, opened.tokenizer_json, opened.chat_template)


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, without reading its weights. Raises CheckpointError or ConfigError."""
    path = Path(path)
    if is_converted(path):
        facts, config = read_description(path)
        tokenizer, template = (path / "tokenizer.json").exists(), (path / "chat_template.jinja").exists()
        kind, role, weights = "converted folder", facts["role"], facts["weights"]
    else:
        opened = _open(path)
        opened.check()
        config = opened.config
        tokenizer, template = opened.tokenizer_json is not None, opened.chat_template is not None
        kind = "GGUF file" if path.is_file() else "Hugging Face folder"
        role, weights = ("drafter" if isinstance(config, DrafterConfig) else "target"), "as published"
    table = parameter_table(config)
    return {
        "path": str(path),
        "kind": kind,
        "role": role,
        "family": family(config),
        "weights": weights,
        "parameters": sum(math.prod(parameter.shape) for parameter in table.values()),
        "tensors": len(table),
        "bytes": _bytes(path),
        "tokenizer": tokenizer,
        "chat_template": template,
        "config": {name: value for name, value in json.loads(config.to_json()).items() if name != "layers"},
        **_layers(config),
    }


def _layers(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    if isinstance(config, DrafterConfig):
        return {"layers": config.num_layers}
    kinds = [dataclasses.asdict(layer) for layer in config.layers]
    return {"layers": config.num_layers, "layer": kinds[0]}


def _open(path: Path) -> Source:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a converted folder, a Hugging Face folder or a .gguf file")
    if path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is one file of a model: give the folder that holds it and its config.json")
        return read_gguf(path)
    if is_converted(path):
        raise CheckpointError(f"{path} is a converted folder already: convert from the original")
    return read_folder(path)


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None
