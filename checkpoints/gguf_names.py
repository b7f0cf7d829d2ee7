"""Tensor names of GGUF files, and ours: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py."""

from __future__ import annotations

_TOP = {"token_embd.weight": "embed", "output_norm.weight": "final_norm", "output.weight": "lm_head"}
_LAYER = {
    "attn_norm.weight": "attention_norm",
    "ffn_norm.weight": "mlp_norm",
    **{f"attn_{name}.weight": f"attention.{name}" for name in "qkv"},
    **{f"attn_{name}.bias": f"attention.{name}_bias" for name in "qkv"},
    "attn_output.weight": "attention.o",
    "attn_output.bias": "attention.o_bias",
    **{f"attn_{name}_norm.weight": f"attention.{name}_norm" for name in "qk"},
    **{f"ffn_{name}.weight": f"mlp.{name}" for name in ("gate", "up", "down")},
}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_norm.weight": "attention_post_norm",
    "post_ffw_norm.weight": "mlp_post_norm",
}
_GEMMA4_TOP = {
    **_TOP,
    "per_layer_token_embd.weight": "per_layer.embed",
    "per_layer_model_proj.weight": "per_layer.projection",
    "per_layer_proj_norm.weight": "per_layer.norm",
}
_GEMMA4_LAYER = {
    **_GEMMA_LAYER,
    "layer_output_scale.weight": "scalar",
    "ffn_gate_inp.weight": "experts.router",
    "ffn_gate_inp.scale": "experts.router_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up",
    "ffn_gate_exps.weight": "experts.gate",
    "ffn_up_exps.weight": "experts.up",
    "ffn_down_exps.weight": "experts.down",
    "ffn_down_exps.scale": "experts.scale",
    "pre_ffw_norm_2.weight": "experts.norm",
    "post_ffw_norm_1.weight": "mlp.dense_post_norm",
    "post_ffw_norm_2.weight": "experts.post_norm",
    "inp_gate.weight": "per_layer.gate",
    "proj.weight": "per_layer.out",
    "post_norm.weight": "per_layer.post_norm",
}
_DRAFTER_TOP = {
    "output_norm.weight": "final_norm",
    **dict.fromkeys(("fc.weight", "dflash.fc.weight", "dflash_fc.weight"), "feature_projection"),
    **dict.fromkeys(
        ("enc.output_norm.weight", "dflash.hidden_norm.weight", "dflash_hidden_norm.weight"), "feature_norm"
    ),
}
_FORK_LAYER = {**_LAYER, "post_attention_norm.weight": "mlp_norm"}

DRAFTERS = ("dflash", "dflash-draft", "qwen35-dflash-draft", "gemma4-dflash-draft")
"""Architectures of drafters: llama.cpp's, and those of its forks."""
_TABLES = {
    "llama": (_TOP, _LAYER),
    "qwen2": (_TOP, _LAYER),
    "qwen3": (_TOP, _LAYER),
    "gemma3": (_TOP, _GEMMA_LAYER),
    "gemma4": (_GEMMA4_TOP, _GEMMA4_LAYER),
    "dflash": (_DRAFTER_TOP, _LAYER),
    **dict.fromkeys(DRAFTERS[1:], (_DRAFTER_TOP, _FORK_LAYER)),
}
ARCHITECTURES = tuple(_TABLES)
"""Values of general.architecture that are read."""
INTERLEAVED = ("llama",)
"""Architectures whose rows of q and k are stored for interleaved RoPE."""


def canonical_name(name: str, architecture: str) -> str | None:
    """Our name for a tensor; None for one that has no place in the architecture."""
    top, layer = _TABLES[architecture]
    if name in top:
        return top[name]
    prefix, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    return f"layers.{index}.{layer[rest]}" if prefix == "blk" and index.isdecimal() and rest in layer else None
