"""Reading any checkpoint and converting it: what `dflash-jax convert`, `inspect` and the engine call."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from checkpoints.errors import CheckpointError
from checkpoints.fit import what_fits
from checkpoints.formats import check_format, encode, stored_bytes
from checkpoints.gguf_source import read_gguf
from checkpoints.groups import Group, plan
from checkpoints.hf_source import read_folder
from checkpoints.manifest import verify as verify_store
from checkpoints.sharding import Placement, Spec, tensor_parallel
from checkpoints.source import Source, family, parameter_table
from checkpoints.store import (
    FORMAT,
    WEIGHTS,
    Reading,
    is_converted,
    join,
    read_description,
    read_weights,
    split,
    write_group,
    write_texts,
)
from checkpoints.unfinished import unfinished_folder
from dflash_jax.console import Bytes, Note
from dflash_jax.models.config import DrafterConfig, ModelConfig
from pallas_kernels.quantised_matmul.api import Weight

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is."""

_ENCODING = "w4 scales in float16"
"""Changes with the bytes that `encode` writes: an unfinished conversion of another version is not gone on with."""
_SOURCE_SUFFIXES = (".safetensors", ".json", ".jinja", ".model")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network in memory. `parameters` go by canonical names; `tokenizer_json` and `chat_template` are texts."""

    role: str
    config: ModelConfig | DrafterConfig
    weights_format: str
    parameters: dict[str, Weight]
    tokenizer_json: str | None
    chat_template: str | None
    reading: Reading | None = None
    """How fast the weights of a converted folder were read."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did: groups in the folder, how many of them an earlier conversion had left, bytes of all."""

    groups: int
    continued: int
    bytes: int


def convert(
    source: Path,
    out: Path,
    *,
    weights: str = "bf16",
    group_size: int = 32,
    role: str = "target",
    progress: Progress | None = None,
) -> Conversion:
    """Writes the converted folder `out` from a Hugging Face folder or a .gguf file, group by group of its tensors.

    A conversion that was killed goes on where it stopped when it is started again with the same source and options.
    Raises CheckpointError or ConfigError for a source or place that does not serve, and then leaves nothing behind; the
    groups that were finished when a disk is full are kept.
    """
    check_format(weights)
    source, out = Path(source), Path(out)
    opened = _open(source)
    if isinstance(opened.config, DrafterConfig) != (role == "drafter"):
        raise CheckpointError(f"{source} holds a {family(opened.config)}: --role {role} does not fit")
    opened.check()
    facts = {"role": role, "weights": weights, "group_size": group_size, "source": source.name}
    groups = plan(opened.table)
    sizes = {name: stored_bytes(name, each, weights, group_size) for name, each in opened.table.items()}
    with unfinished_folder(out, _key(opened, facts, groups)) as growing:
        todo = [group for group in groups if group.name not in growing.finished]
        continued = len(groups) - len(todo)
        total = sum(sizes.values())
        done = total - sum(_bytes_of(group, sizes) for group in todo)
        _check_space(out, total - done)
        if continued and progress:
            note = f"an earlier conversion left {continued} of {len(groups)} groups: going on from there"
            progress(Note(note), Bytes(done), Bytes(total))
        for group, pieces in opened.read(todo):
            if progress:
                progress(f"converting to {weights}", Bytes(done), Bytes(total))
            encoded = {name: encode(name, each, values, weights, group_size) for name, each, values in pieces}
            write_group(growing.store, group.name, encoded)
            del encoded  # before the next group is read
            growing.finish(group)
            done += _bytes_of(group, sizes)
        if progress:
            progress(f"converting to {weights}", Bytes(total), Bytes(total))
        write_texts(growing.folder, opened.config, facts, opened.tokenizer_json, opened.chat_template)
        return Conversion(len(groups), continued, growing.manifest.bytes)


def load(
    path: Path,
    *,
    weights: str = "f32",
    mesh: Mesh | None = None,
    spec: Spec = tensor_parallel,
    progress: Progress | None = None,
) -> Checkpoint:
    """A converted folder, or a Hugging Face folder or .gguf file straight into the format `weights`.

    With a mesh, whose axis is called "tensor", every parameter goes to the devices in the slices that `spec` gives;
    without one, to the default device. Raises CheckpointError or ConfigError with what is wrong and what to do.
    """
    path, placement = Path(path), Placement(mesh, spec)
    if is_converted(path):
        description, config = read_description(path)
        parameters, reading = read_weights(
            path, config, description["group_size"], placement=placement, progress=progress
        )
        return Checkpoint(
            role=description["role"],
            config=config,
            weights_format=description["weights"],
            parameters=parameters,
            tokenizer_json=_text(path / "tokenizer.json"),
            chat_template=_text(path / "chat_template.jinja"),
            reading=reading,
        )
    check_format(weights)
    opened = _open(path)
    opened.check()
    parameters = {}
    groups = plan(opened.table, piece_bytes=sys.maxsize)
    for index, (_, pieces) in enumerate(opened.read(groups)):
        if progress:
            progress("reading weights", index, len(groups))
        for name, parameter, values in pieces:
            parts = split(encode(name, parameter, values, weights, 32))
            placed = {
                part: jax.device_put(each, placement.sharding(name, part, each.shape)) for part, each in parts.items()
            }
            parameters[name] = join(placed, 32)
    role = "drafter" if isinstance(opened.config, DrafterConfig) else "target"
    return Checkpoint(role, opened.config, weights, parameters, opened.tokenizer_json, opened.chat_template)


def verify(path: Path, progress: Progress | None = None) -> list[str]:
    """Compares a converted folder with its checksums: a line for each damaged group, none when all is well.

    Raises CheckpointError when there is nothing to compare.
    """
    path = Path(path)
    if not is_converted(path):
        raise CheckpointError(f"{path} is not a converted folder: only those have checksums")
    read_description(path)
    return verify_store(path / WEIGHTS, progress)


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, without reading its weights, and what of it fits on this device.

    Raises CheckpointError or ConfigError.
    """
    path = Path(path)
    if is_converted(path):
        facts, config = read_description(path)
        tokenizer, template = (path / "tokenizer.json").exists(), (path / "chat_template.jinja").exists()
        kind, role, weights, skipped = "converted folder", facts["role"], facts["weights"], ()
    else:
        opened = _open(path)
        opened.check()
        config, skipped = opened.config, opened.skipped
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
        "skipped": list(skipped),
        **what_fits(config),
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


def _bytes_of(group: Group, sizes: Mapping[str, int]) -> int:
    """About how many bytes a group will have."""
    return sum(sizes[piece.tensor] * (piece.stop - piece.start) // piece.rows for piece in group.pieces)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise CheckpointError(
            f"the disk of {out.parent} is too full: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
            "free some space or choose another place"
        )


def _key(source: Source, facts: Mapping[str, Any], groups: Sequence[Group]) -> str:
    """Equal for conversions that write the same bytes: same files of the source, same config, options and groups."""
    path = source.path
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _SOURCE_SUFFIXES)
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = [group.to_json() for group in groups]
    everything = [FORMAT, _ENCODING, stamps, source.config.to_json(), dict(facts), parts]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None
