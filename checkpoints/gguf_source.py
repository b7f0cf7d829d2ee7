"""GGUF files: metadata to our config, tensor names to ours, quantised blocks to f32 by the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoints.errors import CheckpointError, first_line
from checkpoints.gguf_config import read_config
from checkpoints.gguf_file import GgufTensor, read_header
from checkpoints.gguf_names import ARCHITECTURES, INTERLEAVED, canonical_name
from checkpoints.gguf_tokenizer import tokenizer_json
from checkpoints.hf_names import is_copy, variant_of
from checkpoints.readers import CheckedReader, Rows, flat_rows, flat_shape
from checkpoints.source import Reader, Source
from dflash_jax.models.config import ConfigError, DrafterConfig, ModelConfig

_COPIES_IN_DRAFTERS = ("token_embd.weight", "output.weight")
"""The target's matrices; a reduced vocabulary, which would be the drafter's own, is refused before."""


def read_gguf(path: Path) -> Source:
    """The model in a .gguf file. Raises CheckpointError or ConfigError with what is wrong in it."""
    file = read_header(path)
    architecture = file.fields["general.architecture"].contents() if "general.architecture" in file.fields else None
    if architecture is None:
        raise CheckpointError(f"{path}: metadata general.architecture is missing; the file is damaged")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    parts = file.fields.get("split.count")
    if parts is not None and parts.contents() != 1:
        raise CheckpointError(
            f"{path} is one of {parts.contents()} parts of a model: join them with llama.cpp's llama-gguf-split --merge"
        )
    try:
        config = read_config(file, architecture)
        tokenizer = tokenizer_json(file.fields, path) if "tokenizer.ggml.model" in file.fields else None
    except ConfigError as error:
        raise CheckpointError(f"{path}: metadata is damaged or unusual: {error}") from error
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: metadata is damaged or unusual: {first_line(error)}") from error
    found: dict[str, GgufTensor] = {}
    skipped = []
    for own, tensor in file.tensors.items():
        name = canonical_name(own, architecture)
        if own == "rope_freqs.weight" and architecture in ("llama", "gemma4"):
            continue  # the config has it
        if _is_skipped(own, name, config):
            skipped.append(own)
        elif name is None:
            raise CheckpointError(
                f"{path}: tensor {own} is unknown in architecture {architecture}{variant_of(own, config)}"
            )
        elif name in found:
            raise CheckpointError(f"{path}: tensors {found[name].name} and {own} both hold {name}")
        else:
            found[name] = tensor
    shapes = {name: flat_shape(tensor.shape) for name, tensor in found.items()}
    reads = {name: flat_rows(tensor.rows, tensor.shape) for name, tensor in found.items()}
    if isinstance(config, ModelConfig):
        _join_experts(shapes, reads, found)
        if architecture in INTERLEAVED:
            for name in reads:
                if name.endswith(("attention.q", "attention.k")):
                    reads[name] = _half_split(reads[name], _heads(name, config), shapes[name])
    readers: dict[str, Reader] = {
        name: CheckedReader(f"{path}: tensor {found[name].name}", shapes[name][0], read) for name, read in reads.items()
    }
    template = file.fields.get("tokenizer.chat_template")
    return Source(
        path=path,
        config=config,
        shapes=shapes,
        readers=readers,
        origin={name: tensor.name for name, tensor in found.items()},
        tokenizer_json=tokenizer,
        chat_template=str(template.contents()) if template else None,
        skipped=tuple(skipped),
    )


def half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k matrix from interleaved pairs (2i, 2i + 1) to half-split pairs (i, i + head_dim / 2)."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _is_skipped(own: str, name: str | None, config: ModelConfig | DrafterConfig) -> bool:
    if isinstance(config, DrafterConfig):
        return own in _COPIES_IN_DRAFTERS
    return name is not None and is_copy(name, config)


def _heads(name: str, config: ModelConfig) -> int:
    return config.num_heads if name.endswith("attention.q") else config.layers[0].num_kv_heads


def _half_split(read: Rows, heads: int, shape: tuple[int, ...]) -> Rows:
    """Reads whole heads, whose rows it sorts."""
    height = shape[0] // heads
    if not height or shape[0] % heads or height % 2:
        return read  # of a shape that the config does not ask for, which Source.check says

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start // height, -(-stop // height)
        values = half_split_rows(read(first * height, last * height), last - first)
        return values[start - first * height : stop - first * height]

    return rows


def _join_experts(shapes: dict[str, tuple[int, ...]], reads: dict[str, Rows], found: dict[str, GgufTensor]) -> None:
    """Puts the gate and up matrices of every expert below each other, where a file has them apart."""
    for name in [name for name in reads if name.endswith("experts.gate")]:
        gate, up = found[name], found.get(name.removesuffix("gate") + "up")
        if up is None or len(gate.shape) != 3 or up.shape != gate.shape:
            raise CheckpointError(f"{gate.file}: tensor {gate.name} has no ffn_up_exps of its shape; fetch it again")
        joined = name + "_up"
        experts, height, columns = gate.shape
        shapes[joined] = (experts * 2 * height, columns)
        reads[joined] = flat_rows(_join(gate, up), (experts, 2 * height, columns))
        found[joined] = gate
        for part in (name, name.removesuffix("gate") + "up"):
            del shapes[part], reads[part], found[part]


def _join(gate: GgufTensor, up: GgufTensor) -> Rows:
    return lambda start, stop: np.concatenate([gate.rows(start, stop), up.rows(start, stop)], axis=1)
