"""GGUF files: metadata to our config, tensor names to ours, quantised blocks to f32 by the gguf package."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.gguf_tokenizer import tokenizer_json
from checkpoints.source import Reader, Source
from dflash_jax.models.config import ModelConfig
from dflash_jax.models.hf_config import from_hf

ARCHITECTURES = ("llama", "qwen3")
"""Values of general.architecture that are read."""

_TOP = {"token_embd.weight": "embed", "output_norm.weight": "final_norm", "output.weight": "lm_head"}
_LAYER = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "attention.q",
    "attn_k.weight": "attention.k",
    "attn_v.weight": "attention.v",
    "attn_q.bias": "attention.q_bias",
    "attn_k.bias": "attention.k_bias",
    "attn_v.bias": "attention.v_bias",
    "attn_output.weight": "attention.o",
    "attn_q_norm.weight": "attention.q_norm",
    "attn_k_norm.weight": "attention.k_norm",
    "ffn_norm.weight": "mlp_norm",
    "ffn_gate.weight": "mlp.gate",
    "ffn_up.weight": "mlp.up",
    "ffn_down.weight": "mlp.down",
}
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
"""Control tokens that end a turn; a file often names only one of its stop tokens."""
_INTERLEAVED = ("llama",)
"""Architectures whose rows of q and k are stored for interleaved RoPE."""


def read_gguf(path: Path) -> Source:
    """The model in a .gguf file. Raises CheckpointError for a damaged file or another architecture."""
    reader = _open(path)
    fields = reader.fields
    architecture = _value(fields, "general.architecture", path)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported; supported in GGUF: {', '.join(ARCHITECTURES)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    divisors = tensors.pop("rope_freqs.weight", None)
    tied, bias = "output.weight" not in tensors, "blk.0.attn_q.bias" in tensors
    try:
        config = _config(fields, architecture, path, tied=tied, bias=bias)
    except CheckpointError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: metadata is damaged or unusual: {_first_line(error)}") from error
    if divisors is not None:
        config = _with_llama3_rope(config, _read(divisors, 0, path), path)
    readers: dict[str, Reader] = {}
    shapes, origin = {}, {}
    for own, tensor in tensors.items():
        name = _canonical(own)
        if name is None:
            raise CheckpointError(f"{path}: tensor {own} is unknown in architecture {architecture}")
        interleaved = _interleaved_heads(name, config) if architecture in _INTERLEAVED else 0
        readers[name] = functools.partial(_read, tensor, interleaved, path)
        shapes[name] = tuple(int(size) for size in reversed(tensor.shape))
        origin[name] = own
    return Source(
        path=path,
        config=config,
        shapes=shapes,
        readers=readers,
        origin=origin,
        tokenizer_json=tokenizer_json(fields, path) if "tokenizer.ggml.model" in fields else None,
        chat_template=_optional(fields, "tokenizer.chat_template"),
    )


def half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k matrix from interleaved pairs (2i, 2i + 1) to half-split pairs (i, i + head_dim / 2)."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        return gguf.GGUFReader(str(path))
    except Exception as error:  # the gguf package fails in many ways on damaged files
        raise CheckpointError(f"{path} is damaged or truncated: {_first_line(error)}; fetch it again") from error


def _config(fields: Mapping[str, Any], architecture: str, path: Path, *, tied: bool, bias: bool) -> ModelConfig:
    """The config, by way of the Hugging Face spelling, so that there is one place that knows the families."""

    def number(name: str) -> Any:
        return _value(fields, f"{architecture}.{name}", path)

    def optional(name: str) -> Any:
        return _optional(fields, f"{architecture}.{name}")

    scaling = optional("rope.scaling.type") or "none"
    if scaling not in ("none", "linear"):
        raise CheckpointError(f"{path}: RoPE scaling {scaling!r} is not supported in GGUF; supported: none, linear")
    vocabulary = _optional(fields, "tokenizer.ggml.tokens")
    description = {
        "model_type": architecture,
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": optional("attention.head_count_kv"),
        "head_dim": optional("attention.key_length"),
        "vocab_size": len(vocabulary) if vocabulary is not None else number("vocab_size"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": optional("rope.freq_base"),
        "rope_scaling": {"rope_type": "linear", "factor": number("rope.scaling.factor")} if scaling != "none" else None,
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": tied,
        "eos_token_id": _stop_ids(fields) or None,
        "bos_token_id": _optional(fields, "tokenizer.ggml.bos_token_id"),
        "attention_bias": bias,
    }
    return from_hf(description)


def _stop_ids(fields: Mapping[str, Any]) -> list[int]:
    named = [_optional(fields, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens, types = (_optional(fields, f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type"))
    control = [index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    ends = [index for index in control if index < len(tokens) and tokens[index] in _TURN_ENDS]
    return list(dict.fromkeys([*(id for id in named if id is not None), *ends]))


def _with_llama3_rope(config: ModelConfig, divisors: np.ndarray, path: Path) -> ModelConfig:
    """The llama3 scaling that a table of divisors of the plain frequencies stands for; its factor is the largest."""
    layer = config.layers[0]
    rope = dataclasses.replace(layer.rope, llama3_factor=float(divisors.max()))
    plain, scaled = (np.asarray(each.inverse_frequencies(layer.head_dim)) for each in (layer.rope, rope))
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-3):
        raise CheckpointError(
            f"{path}: tensor rope_freqs.weight is not llama3 scaling from 8192 tokens: convert the Hugging Face folder"
        )
    return dataclasses.replace(config, layers=(dataclasses.replace(layer, rope=rope),) * config.num_layers)


def _optional(fields: Mapping[str, Any], key: str) -> Any:
    return fields[key].contents() if key in fields else None


def _value(fields: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in fields:
        raise CheckpointError(f"{path}: metadata {key} is missing; the file is damaged or not a language model")
    return fields[key].contents()


def _canonical(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    prefix, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    return f"layers.{index}.{_LAYER[rest]}" if prefix == "blk" and index.isdigit() and rest in _LAYER else None


def _interleaved_heads(name: str, config: ModelConfig) -> int:
    if name.endswith("attention.q"):
        return config.num_heads
    return config.layers[0].num_kv_heads if name.endswith("attention.k") else 0


def _read(tensor: Any, interleaved_heads: int, path: Path) -> np.ndarray:
    try:
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except Exception as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name} of type {tensor.tensor_type.name}: {_first_line(error)}"
        ) from error
    return half_split_rows(values, interleaved_heads) if interleaved_heads else values


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
