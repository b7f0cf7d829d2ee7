"""Tensor names of Hugging Face and z-lab checkpoints, and ours. A family differs from another only in these tables."""

from __future__ import annotations

from dflash_jax.models.config import DrafterConfig, ModelConfig

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
"""In front of a text model's names, longest first; multimodal checkpoints have the longer ones."""
_OTHER_MODALITIES = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "multi_modal_projector", "visual")

_TOP = {"embed_tokens.weight": "embed", "norm.weight": "final_norm", "lm_head.weight": "lm_head"}
_DRAFTER_TOP = {
    "fc.weight": "feature_projection",
    "hidden_norm.weight": "feature_norm",
    "norm.weight": "final_norm",
    **{f"path_selector.{name}.weight": f"path.{name}" for name in ("previous", "mix", "out")},
}
_GEMMA4_TOP = {
    **_TOP,
    "embed_tokens_per_layer.weight": "per_layer.embed",
    "per_layer_model_projection.weight": "per_layer.projection",
    "per_layer_projection_norm.weight": "per_layer.norm",
}
_LAYER = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    **{f"self_attn.{name}_proj.weight": f"attention.{name}" for name in "qkvo"},
    **{f"self_attn.{name}_proj.bias": f"attention.{name}_bias" for name in "qkvo"},
    **{f"self_attn.{name}_norm.weight": f"attention.{name}_norm" for name in "qk"},
    **{f"mlp.{name}_proj.weight": f"mlp.{name}" for name in ("gate", "up", "down")},
}
_DRAFTER_LAYER = {
    **_LAYER,
    **{f"{name}_conv.base_kernel": f"{name}_convolution.taps" for name in ("attention", "mlp")},
    **{f"{name}_conv.kernel_projection.weight": f"{name}_convolution.corrections" for name in ("attention", "mlp")},
}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_layernorm.weight": "attention_post_norm",
    "pre_feedforward_layernorm.weight": "mlp_norm",
    "post_feedforward_layernorm.weight": "mlp_post_norm",
}
_GEMMA4_LAYER = {
    **_GEMMA_LAYER,
    "layer_scalar": "scalar",
    "router.proj.weight": "experts.router",
    "router.scale": "experts.router_scale",
    "router.per_expert_scale": "experts.scale",
    "experts.gate_up_proj": "experts.gate_up",
    "experts.down_proj": "experts.down",
    "pre_feedforward_layernorm_2.weight": "experts.norm",
    "post_feedforward_layernorm_1.weight": "mlp.dense_post_norm",
    "post_feedforward_layernorm_2.weight": "experts.post_norm",
    "per_layer_input_gate.weight": "per_layer.gate",
    "per_layer_projection.weight": "per_layer.out",
    "post_per_layer_input_norm.weight": "per_layer.post_norm",
}
_TABLES = {
    "gemma3": (_TOP, _GEMMA_LAYER),
    "gemma4": (_GEMMA4_TOP, _GEMMA4_LAYER),
    "drafter": (_DRAFTER_TOP, _DRAFTER_LAYER),
}
_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that hold nothing that the config does not say."""
_OF_THE_TARGET = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight")
"""Copies of the target's matrices that some drafters carry; hf_config.py refuses drafters whose own they are."""
_SELECTOR = "candidate_selector."
"""Begins the names of DFlash 2's selector, without which its drafters draft too."""
_VARIANTS = {
    "attn_conv_base": "DFlash 2 in a GGUF file",
    "attn_conv_proj": "DFlash 2 in a GGUF file",
    "ffn_conv_base": "DFlash 2 in a GGUF file",
    "ffn_conv_proj": "DFlash 2 in a GGUF file",
    "selector_predecessor": "DFlash 2 in a GGUF file",
    "selector_successor": "DFlash 2 in a GGUF file",
    "selector_hidden": "DFlash 2 in a GGUF file",
    "prefix_gru": "Domino",
    "embed_proj": "Domino",
    "markov_head": "DSpark",
    "confidence_head": "DSpark",
    "markov_w1": "DSpark",
    "markov_w2": "DSpark",
    "conf_proj": "DSpark",
    "d2t": "a reduced vocabulary",
    "t2d": "a reduced vocabulary",
    "g_proj": "gated attention",
    "qkv_proj": "fused q, k and v",
    "attn_sinks": "attention sinks",
}
"""Parts of tensor names, also of GGUF files, by which drafters of a kind that is not supported are known."""


def canonical_name(name: str, config: ModelConfig | DrafterConfig) -> str | None:
    """Our name for a tensor of a checkpoint; None for one that has no place in a model of this family."""
    top, layer = _TABLES.get("drafter" if isinstance(config, DrafterConfig) else config.family, (_TOP, _LAYER))
    short = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
    if short in top:
        return top[short]
    kind, _, rest = short.partition(".")
    index, _, rest = rest.partition(".")
    return f"layers.{index}.{layer[rest]}" if kind == "layers" and index.isdecimal() and rest in layer else None


def drafter_name(ours: str) -> str:
    """z-lab's name for one of a drafter's parameters: what `canonical_name` gives back."""
    top = {own: name for name, own in _DRAFTER_TOP.items()}
    if ours in top:
        return top[ours]
    _, index, rest = ours.split(".", 2)
    return f"layers.{index}.{next(name for name, own in _DRAFTER_LAYER.items() if own == rest)}"


def is_other_modality(name: str) -> bool:
    """Whether a tensor belongs to a model of images or sound, or holds nothing that the config does not say."""
    return name.endswith(_IGNORED) or any(part in name.split(".") for part in _OTHER_MODALITIES)


def is_skipped(name: str, config: ModelConfig | DrafterConfig) -> bool:
    """Whether a tensor is left alone: of another modality, a constant, or a copy that this model does not read."""
    if is_other_modality(name):
        return True
    if isinstance(config, DrafterConfig):
        return is_selector(name, config) or name.removeprefix("model.") in _OF_THE_TARGET
    return is_copy(canonical_name(name, config) or "", config)


def is_selector(name: str, config: ModelConfig | DrafterConfig) -> bool:
    """Whether a tensor belongs to the selector of a DFlash 2 drafter, which is left out."""
    return isinstance(config, DrafterConfig) and name.startswith(_SELECTOR)


def is_copy(ours: str, config: ModelConfig) -> bool:
    """Whether a tensor, by our name, repeats what the model takes from elsewhere."""
    if ours == "lm_head":
        return config.tied_embeddings  # some tied checkpoints store the matrix twice
    kind, _, rest = ours.partition(".")
    index, _, rest = rest.partition(".")
    if kind != "layers" or int(index) >= config.num_layers:
        return False
    # Published files hold keys and values of layers that read another layer's.
    shares = config.layers[int(index)].kv_source is not None
    return shares and rest in ("attention.k", "attention.v", "attention.k_norm")


def variant_of(name: str, config: ModelConfig | DrafterConfig) -> str:
    """The end of a message about an unknown tensor of a drafter: the kind of drafter that it tells of."""
    found = {_VARIANTS[part] for part in name.split(".") if part in _VARIANTS}
    if not found or not isinstance(config, DrafterConfig):
        return ""
    return f": it is a drafter with {found.pop()}, which is not supported; supported: DFlash 1, and 2 from safetensors"
