"""Writes GGUF files from Hugging Face folders as llama.cpp's conversion does: names and keys by the gguf package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from safetensors.numpy import load_file

from checkpoints.hf_names import is_other_modality
from checkpoints.readers import CheckedReader
from checkpoints.source import Reader

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "gemma4": gguf.MODEL_ARCH.GEMMA4,
}
_OTHER_NAMES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}


def checked(reader: Reader) -> CheckedReader:
    """The reader of a source, of which some rows can be read alone."""
    assert isinstance(reader, CheckedReader)
    return reader


Kind = Callable[[str, np.ndarray], gguf.GGMLQuantizationType]


def all_f32(name: str, values: np.ndarray) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.F32


def write_gguf(
    folder: Path, file: Path, *, kind: Kind = all_f32, split_experts: bool = False, inverse_frequencies: Any = None
) -> Path:
    """The model in `folder`, with the types of tensors that `kind` gives."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = described["model_type"].removesuffix("_text")
    fields = {**described, **described.get("text_config", {})}
    writer = gguf.GGUFWriter(str(file), family)
    _common(writer, fields)
    {"gemma3": _gemma3, "gemma4": _gemma4}.get(family, _plain)(writer, fields)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], fields["num_hidden_layers"])
    for own, stored in load_file(folder / "model.safetensors").items():
        if is_other_modality(own):
            continue
        values = np.asarray(stored).astype(np.float32)
        name = _name(own, names)
        if family == "llama":
            values = _interleaved(name, values, fields)
        if family == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        if split_experts and "ffn_gate_up_exps" in name:
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                _add(writer, name.replace("gate_up", part), half, kind)
        else:
            _add(writer, name, values, kind)
    rotary = _divisors(family, fields, inverse_frequencies)
    if rotary is not None:
        writer.add_tensor("rope_freqs.weight", rotary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    chosen = kind(name, values)
    if chosen == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    else:
        writer.add_tensor(name, gguf.quantize(values, chosen), raw_dtype=chosen)


def _name(own: str, names: gguf.TensorNameMap) -> str:
    short = own.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
    _, _, last = short.partition(".layers.")
    index, _, rest = last.partition(".")
    if rest in _OTHER_NAMES:
        return f"blk.{index}.{_OTHER_NAMES[rest]}"
    if rest == "layer_scalar" or rest.startswith("experts."):
        short += ".weight"
    found = names.get_name(short, try_suffixes=(".weight", ".bias"))
    assert found is not None, own
    return found


def _common(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_bos_token_id(fields["bos_token_id"])
    stops = fields["eos_token_id"]
    writer.add_eos_token_id(stops if isinstance(stops, int) else stops[0])


def _plain(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    if "head_dim" in fields:
        writer.add_key_length(fields["head_dim"])
    if fields["model_type"] == "mistral":
        writer.add_sliding_window(fields["sliding_window"])


def _gemma3(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_sliding_window(fields["sliding_window"])
    writer.add_attention_scale(fields["query_pre_attn_scalar"] ** -0.5)  # real files imply it
    kinds = fields.get("layer_types") or [
        "sliding_attention" if (index + 1) % fields["sliding_window_pattern"] else "full_attention"
        for index in range(fields["num_hidden_layers"])
    ]
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    scaling = fields.get("rope_scaling")
    writer.add_rope_freq_base(1e6)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])


def _gemma4(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    sliding = [kind == "sliding_attention" for kind in fields["layer_types"]]
    overrides = fields.get("per_layer_config") or {}
    full = next((overrides[str(index)] for index, slides in enumerate(sliding) if not slides and overrides), {})
    head_dim = fields.get("global_head_dim") or full["head_dim"]
    heads = fields["num_key_value_heads"]
    global_heads = fields.get("num_global_key_value_heads") or full.get("num_key_value_heads")
    width, shared = fields["intermediate_size"], fields["num_kv_shared_layers"]
    writer.add_key_length(head_dim)
    writer.add_key_length_swa(fields["head_dim"])
    writer.add_head_count_kv([heads if slides else global_heads for slides in sliding] if global_heads else heads)
    writer.add_sliding_window(fields["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(shared)
    writer.add_rope_freq_base(fields["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(fields["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_final_logit_softcapping(fields["final_logit_softcapping"])
    writer.add_embedding_length_per_layer_input(fields["hidden_size_per_layer_input"])
    first_shared = len(sliding) - shared
    wide = fields["use_double_wide_mlp"]
    writer.add_feed_forward_length(
        [width * (2 if index >= first_shared else 1) for index in range(len(sliding))] if wide else width
    )
    if fields["enable_moe_block"]:
        writer.add_expert_count(fields["num_experts"])
        writer.add_expert_used_count(fields["top_k_experts"])
        writer.add_expert_feed_forward_length(fields["moe_intermediate_size"])


def _interleaved(name: str, values: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    """Row pairs (i, i + head_dim / 2) of every head come to stand side by side, as llama.cpp wants them."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return values
    head_dim = len(values) // fields[heads]
    order = [half * head_dim // 2 + pair for pair in range(head_dim // 2) for half in range(2)]
    rows = [head * head_dim + row for head in range(fields[heads]) for row in order]
    return values[rows]


def _divisors(family: str, fields: Mapping[str, Any], inverse_frequencies: Any) -> np.ndarray | None:
    if family == "gemma4":
        head_dim = fields.get("global_head_dim") or next(iter(fields["per_layer_config"].values()))["head_dim"]
        turned = head_dim // 8
        return np.array([1.0] * turned + [1e30] * (head_dim // 2 - turned), np.float32)
    if family == "llama" and fields["rope_parameters"]["rope_type"] == "llama3":
        half = len(inverse_frequencies)
        plain = fields["rope_parameters"]["rope_theta"] ** (-np.arange(half) / half)
        return (plain / inverse_frequencies).astype(np.float32)
    return None
