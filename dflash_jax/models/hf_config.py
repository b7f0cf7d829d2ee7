"""Hugging Face `config.json` to our records: the spellings that are found in practice, one small reader per family.

A reader refuses what the decoder does not know. Where a family's published files leave fields out, the defaults are
those of its transformers class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from dflash_jax.models.config import ConfigError, DrafterConfig, ExpertsConfig, LayerConfig, ModelConfig, RopeConfig

Fields = Mapping[str, Any]

_GEMMA_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA3_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "vocab_size": 262_208,
    "num_hidden_layers": 26,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA4_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "vocab_size": 262_144,
    "num_hidden_layers": 30,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "global_head_dim": 512,
}
_GEMMA4_STOPS = (1, 106, 50)
"""End of text, end of turn, begin of a tool's response: the model opens it itself after a call."""
_MISTRAL_WINDOW = 4096
"""What transformers takes for a Mistral config without the field; one with null has full attention."""
_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0
_MOST_LAYERS = 10_000
"""A count beyond this is a mistake, and lists of its length would take all memory."""
_PATTERN = 6
"""Every so many layers of a Gemma is a full one, unless its config says otherwise."""


def from_hf(config: Fields) -> ModelConfig:
    """Normalises a Hugging Face `config.json`; of a multimodal one, the text part.

    Raises ConfigError for a family that is not supported or a field with a value that the decoder does not know.
    """
    family = _FAMILY_OF.get(str(config.get("model_type")))
    if family is None:
        raise ConfigError(
            f"model family {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    text = config.get("text_config")
    fields = {**config, **text, "model_type": config["model_type"]} if isinstance(text, Mapping) else dict(config)
    where = f"config.json of family {family}"
    stops = dict.fromkeys([*token_ids(config, "eos_token_id", where), *token_ids(fields, "eos_token_id", where)])
    return _READERS[family]({**fields, "eos_token_id": list(stops) or None}, where)


def _llama(fields: Fields, where: str) -> ModelConfig:
    layer = _layer(fields, where)
    if fields["model_type"] == "mistral":
        window = fields.get("sliding_window", _MISTRAL_WINDOW)
        layer = dataclasses.replace(layer, window=int(window) if window else None)
    biased = bool(fields.get("attention_bias"))
    return _model("llama", fields, where, [layer], attention_bias=biased, output_bias=biased)


def _qwen2(fields: Fields, where: str) -> ModelConfig:
    return _model("qwen2", fields, where, _qwen_layers(fields, where), attention_bias=True)


def _qwen3(fields: Fields, where: str) -> ModelConfig:
    biased = bool(fields.get("attention_bias"))
    layers = _qwen_layers(fields, where)
    return _model("qwen3", fields, where, layers, qk_norm=True, attention_bias=biased, output_bias=biased)


def _qwen_layers(fields: Fields, where: str) -> list[LayerConfig]:
    """A window on the layers from `max_window_layers` on, if windows are switched on at all."""
    layer, count = _layer(fields, where), _layer_count(fields, where)
    if not fields.get("use_sliding_window") or not fields.get("sliding_window"):
        return [layer]
    first = int(fields.get("max_window_layers", 28))
    default = ["full_attention" if index < first else "sliding_attention" for index in range(count)]
    sliding = dataclasses.replace(layer, window=_count(fields, "sliding_window", where))
    return [sliding if kind == "sliding_attention" else layer for kind in _kinds(fields, where, default)]


def _gemma3(fields: Fields, where: str) -> ModelConfig:
    fields = {**_GEMMA3_DEFAULTS, **fields}
    _refuse(fields, where, "attn_logit_softcapping", "use_bidirectional_attention")
    scale = float(fields["query_pre_attn_scalar"]) ** -0.5
    ropes = fields.get("rope_parameters") or {}
    full = {"rope_theta": fields.get("rope_theta"), **(fields.get("rope_scaling") or {})}
    local = {"rope_theta": _number(fields, "rope_local_base_freq", where, _LOCAL_THETA)}
    full_rope = _rope(ropes.get("full_attention") or full, where, theta=_GLOBAL_THETA)
    local_rope = _rope(ropes.get("sliding_attention") or local, where, theta=_LOCAL_THETA)
    base = dataclasses.replace(_layer(fields, where, rope=full_rope), attention_scale=scale)
    sliding = dataclasses.replace(base, rope=local_rope, window=_count(fields, "sliding_window", where))
    kinds = _kinds(fields, where, _pattern(fields, where))
    layers = [sliding if kind == "sliding_attention" else base for kind in kinds]
    return _model("gemma3", fields, where, layers, qk_norm=True, norm_offset=1.0, **_gemma_switches(fields, where))


def _gemma4(fields: Fields, where: str) -> ModelConfig:
    fields = {**_GEMMA4_DEFAULTS, **fields}
    if fields.get("use_bidirectional_attention") == "all":
        raise ConfigError(f"{where}: use_bidirectional_attention 'all' is not supported: this engine generates text")
    count = _layer_count(fields, where)
    kinds = _kinds(fields, where, _pattern(fields, where))
    kinds[-1] = "full_attention"
    shared = _optional_count(fields, "num_kv_shared_layers", where, 0, least=0)
    layers = [_gemma4_layer(fields, where, index, kind) for index, kind in enumerate(kinds)]
    for index in range(count - shared, count):
        own = [source for source in range(count - shared) if kinds[source] == kinds[index]]
        if not own:
            raise ConfigError(f"{where}: no layer of kind {kinds[index]} below the {shared} that share K and V")
        width = layers[index].mlp_width * (2 if fields.get("use_double_wide_mlp") else 1)
        layers[index] = dataclasses.replace(layers[index], kv_source=own[-1], mlp_width=width)
    experts = None
    if fields.get("enable_moe_block"):
        names = ("num_experts", "top_k_experts", "moe_intermediate_size")
        experts = ExpertsConfig(*(_count(fields, name, where) for name in names))
    per_layer = _optional_count(fields, "hidden_size_per_layer_input", where, 0, least=0)
    stops = dict.fromkeys([*token_ids(fields, "eos_token_id", where), *_GEMMA4_STOPS])
    return _model(
        "gemma4",
        {**fields, "eos_token_id": [id for id in stops if id < _count(fields, "vocab_size", where)]},
        where,
        layers,
        qk_norm=True,
        v_norm=True,
        layer_scalar=True,
        experts=experts,
        per_layer_width=per_layer,
        per_layer_vocab=_count(fields, "vocab_size_per_layer_input", where) if per_layer else 0,
        suppressed_ids=token_ids(fields, "suppress_tokens", where),
        **_gemma_switches(fields, where),
    )


def _gemma4_layer(fields: Fields, where: str, index: int, kind: str) -> LayerConfig:
    full, one_projection = kind == "full_attention", bool(fields.get("attention_k_eq_v"))
    numbers = dict(fields)
    if full:
        numbers["head_dim"] = fields["global_head_dim"]
        if one_projection and fields.get("num_global_key_value_heads") is not None:
            numbers["num_key_value_heads"] = fields["num_global_key_value_heads"]
    # transformers writes the numbers of full layers once more, layer by layer, when it saves a config.
    numbers |= (fields.get("per_layer_config") or {}).get(str(index), {})
    theta = _GLOBAL_THETA if full else _LOCAL_THETA
    default = {"rope_type": "proportional", "partial_rotary_factor": 0.25} if full else {}
    parameters = (fields.get("rope_parameters") or {}).get(kind) or default
    rope = _rope(parameters, where, theta=theta, head_dim=_count(numbers, "head_dim", where))
    layer = dataclasses.replace(_layer(numbers, where, rope=rope), attention_scale=1.0)
    if full:
        return dataclasses.replace(layer, values_are_keys=one_projection)
    return dataclasses.replace(layer, window=_count(fields, "sliding_window", where))


def _gemma_switches(fields: Fields, where: str) -> dict[str, Any]:
    if fields.get("attention_bias"):
        raise ConfigError(f"{where}: attention_bias true is not supported; supported: false")
    return {
        "sandwich_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": float(_count(fields, "hidden_size", where)) ** 0.5,
        "final_softcap": fields.get("final_logit_softcapping"),
    }


_READERS: dict[str, Callable[[Fields, str], ModelConfig]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}
FAMILIES = tuple(_READERS)
"""Families whose numbers are tested against a reference implementation."""
_FAMILY_OF = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _layer(fields: Fields, where: str, rope: RopeConfig | None = None) -> LayerConfig:
    hidden, heads = _count(fields, "hidden_size", where), _count(fields, "num_attention_heads", where)
    head_dim = _optional_count(fields, "head_dim", where, hidden // heads)
    return LayerConfig(
        head_dim=head_dim,
        num_kv_heads=_optional_count(fields, "num_key_value_heads", where, heads),
        mlp_width=_count(fields, "intermediate_size", where),
        attention_scale=head_dim**-0.5,
        rope=_flat_rope(fields, where) if rope is None else rope,
    )


def _model(family: str, fields: Fields, where: str, layers: list[LayerConfig], **switches: Any) -> ModelConfig:
    """The record of a model; one layer stands for all."""
    count = _layer_count(fields, where)
    activation = fields.get("hidden_activation") or fields.get("hidden_act") or "silu"
    expected = switches.get("activation", "silu")
    if _ACTIVATIONS.get(activation) != expected:
        raise ConfigError(f"hidden_act {activation!r} is not supported for family {family}; supported: {expected}")
    if fields.get("mlp_bias"):
        raise ConfigError("mlp_bias true is not supported")
    return ModelConfig(
        family=family,
        vocab_size=_count(fields, "vocab_size", where),
        hidden_size=_count(fields, "hidden_size", where),
        num_heads=_count(fields, "num_attention_heads", where),
        layers=tuple(layers * count if len(layers) == 1 else layers),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        context_length=_optional_count(fields, "max_position_embeddings", where, 2048),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        stop_ids=token_ids(fields, "eos_token_id", where),
        bos_id=next(iter(token_ids(fields, "bos_token_id", where)), None),
        **switches,
    )


def _kinds(fields: Fields, where: str, default: list[str]) -> list[str]:
    """The kind of every layer."""
    kinds = list(fields.get("layer_types") or default)
    count = _layer_count(fields, where)
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(f"{where}: layer type {unknown[0]!r} is not supported")
    if len(kinds) != count:
        raise ConfigError(f"{where}: layer_types has {len(kinds)} entries for {count} layers")
    return kinds


def _pattern(fields: Fields, where: str) -> list[str]:
    count = _layer_count(fields, where)
    every = _optional_count(fields, "sliding_window_pattern", where, _PATTERN)
    return ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(count)]


def _refuse(fields: Fields, where: str, *names: str) -> None:
    for name in names:
        if fields.get(name):
            raise ConfigError(f"{where}: {name} {fields[name]!r} is not supported")


def _count(fields: Fields, name: str, where: str, least: int = 1) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        given = "missing" if value is None else repr(value)
        raise ConfigError(f"{where}: {name} is {given}, expected a whole number of at least {least}")
    return value


def _layer_count(fields: Fields, where: str) -> int:
    count = _count(fields, "num_hidden_layers", where)
    if count > _MOST_LAYERS:
        raise ConfigError(f"{where}: num_hidden_layers is {count}, at most {_MOST_LAYERS} are supported")
    return count


def _optional_count(fields: Fields, name: str, where: str, default: int, least: int = 1) -> int:
    return default if fields.get(name) is None else _count(fields, name, where, least)


def token_ids(fields: Fields, name: str, where: str) -> tuple[int, ...]:
    """A field that holds one token id, a list of them or nothing. Raises ConfigError for anything else."""
    value = fields.get(name)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise ConfigError(f"{where}: {name} is {value!r}, expected a token id or a list of them")
    return ids


def _number(fields: Fields, name: str, where: str, default: float) -> float:
    """A finite number above 0; where it is missing, null or 0, the default."""
    value = fields.get(name) or default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: {name} is {value!r}, expected a number above 0")
    return float(value)


def _flat_rope(fields: Fields, where: str) -> RopeConfig:
    """Both spellings: flat `rope_theta` + `rope_scaling`, and `rope_parameters` of transformers 5."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    return _rope(parameters, where, theta=_number(fields, "rope_theta", where, _LOCAL_THETA))


def _rope(parameters: Fields, where: str, *, theta: float, head_dim: int = 0) -> RopeConfig:
    theta = _number(parameters, "rope_theta", where, theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    try:
        if kind == "default":
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(theta=theta, linear_factor=float(parameters["factor"]))
        if kind == "proportional":
            share = float(parameters.get("partial_rotary_factor", 1.0))
            pairs = int(share * head_dim // 2)
            return RopeConfig(theta=theta, rotated_pairs=pairs, linear_factor=float(parameters.get("factor", 1.0)))
        if kind == "llama3":
            return RopeConfig(
                theta=theta,
                llama3_factor=float(parameters["factor"]),
                llama3_low_freq_factor=float(parameters["low_freq_factor"]),
                llama3_high_freq_factor=float(parameters["high_freq_factor"]),
                llama3_original_context=int(parameters["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ConfigError(f"{where}: rope type {kind} needs the field {error}, which it does not have") from error
    raise ConfigError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3, proportional")


def default_target_layers(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Which target layers feed a drafter that does not say so: evenly spread from layer 1 to the last but two.

    Raises ConfigError for a target that has fewer layers between these two.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    available = max(num_target_layers - 3, 1)
    if num_draft_layers > available:
        raise ConfigError(
            f"a drafter that reads {num_draft_layers} layers of a target of {num_target_layers}: "
            f"it can read {available} at most"
        )
    return tuple(
        round(1 + index * (num_target_layers - 4) / (num_draft_layers - 1)) for index in range(num_draft_layers)
    )


def is_drafter(config: Fields) -> bool:
    """Whether a config describes a drafter, in z-lab's or in the "speculators" spelling."""
    return "dflash_config" in config or "speculators_model_type" in config


def drafter_from_hf(config: Fields) -> DrafterConfig:
    """Normalises the `config.json` of z-lab's DFlash checkpoints, and of those in the layout of "speculators".

    Raises ConfigError when a field is missing or names a variant that is not supported.
    """
    if "speculators_model_type" in config:
        config = _from_speculators(config)
    options = dict(config.get("dflash_config") or {})
    unsupported = [name for name in _DRAFTER_VARIANTS if options.get(name)]
    if unsupported:
        raise ConfigError(
            f"drafter variant {_DRAFTER_VARIANTS[unsupported[0]]} ({', '.join(unsupported)}) is not supported; "
            "supported: DFlash 1, and 2 from safetensors"
        )
    where = "config.json of a drafter"
    hidden, heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    count, target_layers = _layer_count(config, where), options.get("target_layer_ids")
    if not target_layers or config.get("num_target_layers") is not None:
        _count(config, "num_target_layers", where)
    width, vocab_size = _count(config, "intermediate_size", where), _count(config, "vocab_size", where)
    mask_id = _count(options, "mask_token_id", f"dflash_config in {where}", least=0)
    if mask_id >= vocab_size:
        raise ConfigError(f"{where}: mask_token_id is {mask_id}, the vocabulary has {vocab_size}")
    kinds = _kinds(config, where, ["full_attention"] * count)
    window = config.get("sliding_window") or options.get("swa_window_size")
    sliding = [kind == "sliding_attention" for kind in kinds]
    is_causal = config.get("is_causal", options.get("causal"))
    num_target_layers = config.get("num_target_layers")
    taken = tuple(int(id) for id in target_layers or default_target_layers(num_target_layers or 0, count))
    if min(taken) < 0 or (num_target_layers is not None and max(taken) >= num_target_layers):
        raise ConfigError(f"{where}: target_layer_ids {list(taken)} for a target of {num_target_layers} layers")
    block_size = int(config.get("block_size") or options.get("block_size") or 16)
    if block_size < 2:
        raise ConfigError(f"{where}: block_size is {block_size}: a block has an anchor and at least one token to draft")
    return DrafterConfig(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_optional_count(config, "num_key_value_heads", where, heads),
        head_dim=_optional_count(config, "head_dim", where, hidden // heads),
        mlp_width=width,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_flat_rope(config, where),
        block_size=block_size,
        mask_id=mask_id,
        target_layers=taken,
        windows=tuple(int(window) if slides and window else None for slides in sliding),
        causal=tuple(slides if is_causal is None else bool(is_causal) for slides in sliding),
        num_target_layers=num_target_layers,
        vocab_size=vocab_size,
        path_rank=_optional_count(options, "path_rank", f"dflash_config in {where}", 0, least=0),
        convolution_group=_convolution_group(options, f"dflash_config in {where}"),
    )


def _convolution_group(options: Fields, where: str) -> int:
    taps = _optional_count(options, "conv_kernel_size", where, 0, least=0)
    if taps not in (0, 2):
        raise ConfigError(f"{where}: conv_kernel_size is {taps}; supported: 2")
    return _count(options, "conv_group_size", where) if taps else 0


def drafter_to_hf(config: DrafterConfig) -> dict[str, Any]:
    """The `config.json` of a drafter in z-lab's spelling; `drafter_from_hf` reads it back.

    Raises ConfigError for one that this spelling cannot say: windows or masks that differ from layer to layer.
    """
    windows = {window for window in config.windows if window is not None}
    if len(windows) > 1 or len(set(config.causal)) > 1:
        raise ConfigError(f"windows {config.windows} and causal {config.causal}: expected one of each")
    options: dict[str, Any] = {"mask_token_id": config.mask_id, "target_layer_ids": list(config.target_layers)}
    if config.path_rank:
        options["path_rank"] = config.path_rank
    if config.convolution_group:
        options |= {"conv_kernel_size": 2, "conv_group_size": config.convolution_group}
    return {
        "architectures": ["DFlash2DraftModel" if config.convolution_group else "DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "vocab_size": config.vocab_size,
        "num_target_layers": config.num_target_layers,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in config.windows],
        "sliding_window": next(iter(windows), None),
        "is_causal": config.causal[0],
        "block_size": config.block_size,
        "dtype": "bfloat16",
        "dflash_config": options,
    }


_DRAFTER_VARIANTS = {
    "projector_type": "with a correction head",
    "attention_sink_bias": "with attention sinks",
    "attention_value_scale": "with scaled values",
    "draft_vocab_size": "with a vocabulary and an lm_head of its own",
    "sample_from_anchor": "that samples from the anchor",
    "target_hidden_size": "of another width than its target",
}
"""Options of drafters that are not supported, and what they mean."""


def _from_speculators(config: Fields) -> Fields:
    """z-lab's spelling of a config of the "speculators" library.

    It counts layers by index into transformers' hidden states, one more than the layer that made them. With the
    target's whole vocabulary, embedding and lm_head are the target's own; a reduced one comes with a head of its own.
    """
    kind = config["speculators_model_type"]
    if kind != "dflash":
        raise ConfigError(f"speculators_model_type {kind!r} is not supported; supported: dflash")
    layers = config.get("transformer_layer_config")
    if not isinstance(layers, Mapping):
        raise ConfigError("config.json of a drafter: transformer_layer_config is missing")
    ids = config.get("aux_hidden_state_layer_ids")
    if not ids:
        raise ConfigError("config.json of a drafter: aux_hidden_state_layer_ids is missing")
    options: dict[str, Any] = {
        "target_layer_ids": [int(id) - 1 for id in ids],
        "mask_token_id": config.get("mask_token_id"),
        "block_size": config.get("block_size", 8),
        "sample_from_anchor": config.get("sample_from_anchor") or config.get("shift_label"),
    }
    if config.get("projector_type") != "dflash":
        options["projector_type"] = config.get("projector_type")
    if config.get("sliding_window_non_causal"):
        options["causal"] = False
    if config.get("draft_vocab_size") not in (None, layers.get("vocab_size")):
        options["draft_vocab_size"] = config["draft_vocab_size"]
    if config.get("target_hidden_size") not in (None, layers.get("hidden_size")):
        options["target_hidden_size"] = config["target_hidden_size"]
    return {**layers, "dflash_config": options}
