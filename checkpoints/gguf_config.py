"""Metadata of GGUF files as Hugging Face would have written it, so that there is one place that knows the families."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.gguf_file import GgufFile, GgufTensor
from checkpoints.gguf_names import DRAFTERS
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.hf_config import drafter_from_hf, from_hf

Description = dict[str, Any]

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>")
"""Control tokens that end a turn; a file often names only one of its stop tokens."""
_GEMMA3_PATTERN = 6
"""Every so many layers is a full one: no key says it."""
_GEMMA3_27B = 62
"""The number of layers by which llama.cpp knows the one Gemma 3 whose attention scale is not of its head_dim."""
_LUCEBOX_PATTERN = ("sliding_attention",) * 4 + ("full_attention",)
"""Kinds of layers of drafters for Gemma 4 whose file has a window and no pattern."""


def read_config(file: GgufFile, architecture: str) -> ModelConfig | DrafterConfig:
    """The record of the model. Raises CheckpointError or ConfigError for metadata that is missing or not supported."""
    metadata = _Metadata(file, architecture)
    if architecture in DRAFTERS:
        return drafter_from_hf(_drafter(metadata))
    config = from_hf({**_common(metadata), **_DESCRIBE[architecture](metadata)})
    if architecture == "gemma3":
        return dataclasses.replace(config, norm_offset=0.0)  # stored as 1 + w
    divisors = file.tensors.get("rope_freqs.weight")
    return _with_llama3_rope(config, divisors, file) if architecture == "llama" and divisors else config


class _Metadata:
    """Typed access to the fields of one architecture."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def get(self, name: str, default: Any = None) -> Any:
        return self.other(f"{self.architecture}.{name}", default)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise self.error(f"metadata {self.architecture}.{name} is missing")
        return value

    def other(self, key: str, default: Any = None) -> Any:
        return self.file.fields[key].contents() if key in self.file.fields else default

    def layers(self, name: str, value: Any) -> list[Any]:
        """A number for all layers, or one for each."""
        count = self.count
        each = value if isinstance(value, list) else [value] * count
        if len(each) != count:
            raise self.error(f"metadata {self.architecture}.{name} has {len(each)} entries for {count} layers")
        return each

    @property
    def count(self) -> int:
        count = self.need("block_count")
        # Every layer has tensors of its own, so that a damaged count never makes lists of its size.
        if not isinstance(count, int) or isinstance(count, bool) or count > len(self.file.tensors):
            raise self.error(f"num_hidden_layers is {count!r} with {len(self.file.tensors)} tensors")
        return count

    def rows(self, tensor: str) -> int:
        found = self.file.tensors.get(tensor)
        if found is None:
            raise self.error(f"tensor {tensor} is missing")
        return found.shape[0]

    def kinds(self, sliding: list[Any]) -> list[str]:
        return ["sliding_attention" if slides else "full_attention" for slides in sliding]

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {reason}; the file is damaged or not a language model")


def _common(metadata: _Metadata) -> Description:
    widths = metadata.layers("feed_forward_length", metadata.need("feed_forward_length"))
    heads = metadata.get("attention.head_count_kv")
    vocab_size = metadata.rows("token_embd.weight")
    tokens = metadata.other("tokenizer.ggml.tokens") or []
    if len(tokens) > vocab_size:
        raise metadata.error(f"the tokenizer has {len(tokens)} ids, tensor token_embd.weight {vocab_size} rows")
    return {
        "model_type": metadata.architecture,
        "hidden_size": metadata.need("embedding_length"),
        "num_hidden_layers": metadata.count,
        "intermediate_size": widths[0] if widths else None,
        "num_attention_heads": metadata.need("attention.head_count"),
        "num_key_value_heads": heads,
        "head_dim": metadata.get("attention.key_length"),
        "vocab_size": vocab_size,
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("rope.freq_base"),
        "rope_scaling": _scaling(metadata),
        "max_position_embeddings": metadata.need("context_length"),
        "tie_word_embeddings": "output.weight" not in metadata.file.tensors,
        "eos_token_id": _stop_ids(metadata, vocab_size) or None,
        "bos_token_id": metadata.other("tokenizer.ggml.bos_token_id"),
        "attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors,
    }


def _scaling(metadata: _Metadata) -> Description | None:
    kind = metadata.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{metadata.file.path}: RoPE scaling {kind!r} is not supported in GGUF; supported: none, linear"
        )
    return {"rope_type": "linear", "factor": metadata.need("rope.scaling.factor")} if kind == "linear" else None


def _llama(metadata: _Metadata) -> Description:
    window = metadata.get("attention.sliding_window")
    return {"model_type": "mistral", "sliding_window": window} if window else {}


def _qwen(metadata: _Metadata) -> Description:
    return {}


def _gemma3(metadata: _Metadata) -> Description:
    window, heads = metadata.get("attention.sliding_window"), metadata.need("attention.head_count")
    scale, head_dim = metadata.get("attention.scale"), metadata.get("attention.key_length") or 256
    pattern = metadata.get("attention.sliding_window_pattern", _GEMMA3_PATTERN)
    if isinstance(pattern, list):
        sliding = metadata.layers("attention.sliding_window_pattern", pattern)
    else:
        sliding = [bool((index + 1) % int(pattern)) for index in range(metadata.count)]
    if metadata.count == _GEMMA3_27B and scale is None:
        scale = (metadata.need("embedding_length") / heads) ** -0.5
    return {
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim if scale is None else scale**-2,
        "sliding_window": window or 1,
        "layer_types": metadata.kinds(sliding if window else [False] * metadata.count),
        "rope_local_base_freq": metadata.get("rope.freq_base_swa"),
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
    }


def _gemma4(metadata: _Metadata) -> Description:
    tensors = metadata.file.tensors
    sliding = metadata.layers("attention.sliding_window_pattern", metadata.need("attention.sliding_window_pattern"))
    widths = metadata.layers("feed_forward_length", metadata.need("feed_forward_length"))
    heads = metadata.layers("attention.head_count_kv", metadata.need("attention.head_count_kv"))
    head_dim, shared = metadata.need("attention.key_length"), metadata.get("attention.shared_kv_layers", 0)
    # No key says that full layers have one projection for K and V: they lack the second then.
    own_full = [index for index in range(len(sliding) - shared) if not sliding[index]]
    without = [f"blk.{index}.attn_v.weight" not in tensors for index in own_full]
    if any(without) != all(without):
        missing = own_full[without.index(True)]
        raise metadata.error(f"tensor blk.{missing}.attn_v.weight is missing in one full layer and not in all")
    per_layer = metadata.get("embedding_length_per_layer_input", 0)
    experts = metadata.get("expert_count", 0)
    return {
        "layer_types": metadata.kinds(sliding),
        "sliding_window": metadata.need("attention.sliding_window"),
        "head_dim": metadata.get("attention.key_length_swa", head_dim),
        "global_head_dim": head_dim,
        "num_key_value_heads": heads[0] if heads else None,
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": any(without),
        "per_layer_config": {
            str(index): {"intermediate_size": width, "num_key_value_heads": count}
            for index, (width, count) in enumerate(zip(widths, heads, strict=True))
        },
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": metadata.get("rope.freq_base"),
                "partial_rotary_factor": _rotated_share(metadata, head_dim),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa")},
        },
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
        "enable_moe_block": bool(experts),
        "num_experts": experts,
        "top_k_experts": metadata.get("expert_used_count"),
        "moe_intermediate_size": metadata.get("expert_feed_forward_length"),
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": metadata.rows("per_layer_token_embd.weight") if per_layer else None,
    }


def _rotated_share(metadata: _Metadata, head_dim: int) -> float:
    """Frequencies of full layers are divided by 1 or by a number so big that these pairs do not turn."""
    tensor = metadata.file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return 0.25
    divisors = tensor.rows(0, tensor.shape[0])
    turned = int(np.count_nonzero(divisors == 1))
    if divisors.shape != (head_dim // 2,) or not (divisors[:turned] == 1).all() or (divisors[turned:] < 1e20).any():
        raise metadata.error("tensor rope_freqs.weight is not that of Gemma 4")
    return 2 * turned / head_dim


def _drafter(metadata: _Metadata) -> Description:
    """llama.cpp counts target layers by the one that reads them, one more than the layer that made the feature."""
    tensors, forked = metadata.file.tensors, metadata.architecture != "dflash"
    ids = metadata.need("dflash.target_layer_ids") if forked else [id - 1 for id in metadata.need("target_layers")]
    mask = metadata.get("dflash.mask_token_id") if forked else metadata.other("tokenizer.ggml.mask_token_id")
    window = metadata.get("attention.sliding_window")
    pattern = metadata.get("attention.sliding_window_pattern")
    count = metadata.count
    if not window:
        kinds = ["full_attention"] * count
    elif pattern is not None:
        kinds = metadata.kinds(metadata.layers("attention.sliding_window_pattern", pattern))
    elif len(_LUCEBOX_PATTERN) == count:
        kinds = list(_LUCEBOX_PATTERN)
    else:
        raise metadata.error(f"it has a sliding window and no pattern that says which of {count} layers have it")
    tokens = metadata.other("tokenizer.ggml.tokens")
    first_gate = "blk.0.ffn_gate.weight"
    return {
        "hidden_size": metadata.need("embedding_length"),
        "num_hidden_layers": count,
        "intermediate_size": metadata.get("feed_forward_length") or metadata.rows(first_gate),
        "num_attention_heads": metadata.need("attention.head_count"),
        "num_key_value_heads": metadata.get("attention.head_count_kv"),
        "head_dim": metadata.get("attention.key_length"),
        "vocab_size": metadata.get("vocab_size") or (len(tokens) if tokens else None),
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("rope.freq_base"),
        "rope_scaling": _scaling(metadata),
        "layer_types": kinds,
        "sliding_window": window,
        "is_causal": metadata.get("attention.causal"),
        # A fork's dflash.n_target_layers counts features in some files and the target's layers in others.
        "dflash_config": {
            "target_layer_ids": ids,
            "mask_token_id": mask,
            "block_size": metadata.get("dflash.block_size" if forked else "block_size", 16),
            "attention_value_scale": metadata.get("attention.value_scale"),
            "draft_vocab_size": tensors["d2t"].shape[0] if "d2t" in tensors else None,
        },
    }


_DESCRIBE: Mapping[str, Callable[[_Metadata], Description]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}


def _stop_ids(metadata: _Metadata, vocab_size: int) -> list[int]:
    named = [metadata.other(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens, types = (metadata.other(f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type"))
    control = [index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    ends = [index for index in control if index < len(tokens) and tokens[index] in _TURN_ENDS]
    found = dict.fromkeys([*(id for id in named if id is not None), *ends])
    return [id for id in found if id < vocab_size]


def _with_llama3_rope(config: ModelConfig, tensor: GgufTensor, file: GgufFile) -> ModelConfig:
    """The llama3 scaling that a table of divisors of the plain frequencies stands for.

    Its factor is the largest divisor. The context that the model was trained with first shows in any divisor between
    that and 1.
    """
    layer, divisors = config.layers[0], tensor.rows(0, tensor.shape[0])
    unknown = CheckpointError(
        f"{file.path}: tensor rope_freqs.weight is not llama3 scaling: convert the Hugging Face folder"
    )
    if divisors.shape != (layer.head_dim // 2,):
        raise unknown
    plain = np.asarray(layer.rope.inverse_frequencies(layer.head_dim))
    rope = dataclasses.replace(layer.rope, llama3_factor=float(divisors.max()))
    low, high = rope.llama3_low_freq_factor, rope.llama3_high_freq_factor
    blended = np.flatnonzero((divisors > 1 + 1e-4) & (divisors < divisors.max() * (1 - 1e-4)))
    if len(blended):
        pair, least = blended[0], 1 / float(divisors.max())
        blend = (1 / float(divisors[pair]) - least) / (1 - least)
        context = (blend * (high - low) + low) * 2 * np.pi / plain[pair]
        rope = dataclasses.replace(rope, llama3_original_context=round(float(context)))
    scaled = np.asarray(rope.inverse_frequencies(layer.head_dim))
    if not np.allclose(plain / scaled, divisors, rtol=1e-3):
        raise unknown
    return dataclasses.replace(config, layers=(dataclasses.replace(layer, rope=rope),) * config.num_layers)
