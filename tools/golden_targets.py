"""Goldens of the target families, from transformers.

expected.npz holds `input_ids` i64[sequences, tokens], `hidden_states` f32[layers + 1, sequences, tokens, dim] (the
embeddings, then the residual stream after each layer; the last one has passed the final norm), `logits` f32[sequences,
tokens, vocab], and the same logits for RoPE `gap_positions` that jump, as in a pruned prompt: `gap_logits`; `queries`
and `keys` of the last layer f32[sequences, tokens, heads, head_dim] before RoPE; `inverse_frequencies` (of Gemma:
`full_inverse_frequencies` and `sliding_inverse_frequencies`) f32[head_dim / 2] is what RoPE turns by.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import transformers
from golden_models import randomise, write

SEQUENCES, TOKENS = 2, 40
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-2,  # big enough for a wrong one to show
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


@torch.inference_mode()
def make(family: str, seed: int, options: dict[str, object], folder: Path) -> None:
    options = dict(options)
    hub, prefix = options.pop("hub", None), options.pop("prefix", None)
    text_config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = text_config(**{**SHAPE, **options})
    model = randomise(getattr(transformers, f"{family}ForCausalLM")(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    input_ids = torch.randint(3, config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    steps = torch.randint(1, 4, (SEQUENCES, TOKENS), generator=generator)
    gap_positions = torch.cumsum(steps, dim=1)
    mask = torch.ones_like(input_ids)  # without it, transformers takes a jump in positions for a new packed document
    gaps = model(input_ids, attention_mask=mask, position_ids=gap_positions, use_cache=False)
    last, taken = model.model.layers[-1].self_attn, {}
    sources = {"q": last, "k": last if hasattr(last, "k_proj") else key_source(model, config)}
    for letter, attention in sources.items():
        module = getattr(attention, f"{letter}_norm", None) or getattr(attention, f"{letter}_proj")
        module.register_forward_hook(lambda _module, _inputs, output, letter=letter: taken.update({letter: output}))
    plain = model(input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    saved = config.to_diff_dict() | {"architectures": [f"{family}ForCausalLM"], "model_type": config.model_type}
    write(
        folder,
        model,
        hub_config(saved, hub) if hub else saved,
        rename=lambda name: name.replace("model.", prefix, 1) if prefix and name.startswith("model.") else name,
        others={"model.vision_tower.patch_embed.weight": torch.zeros(2, 3)} if prefix else None,
        input_ids=input_ids.numpy(),
        hidden_states=torch.stack(plain.hidden_states).numpy(),
        logits=plain.logits.numpy(),
        gap_positions=gap_positions.numpy(),
        gap_logits=gaps.logits.numpy(),
        queries=by_token(taken["q"], last.head_dim),
        keys=by_token(taken["k"], last.head_dim),
        **frequencies(model.model.rotary_emb),
    )


def by_token(heads: torch.Tensor, head_dim: int) -> np.ndarray:
    """[sequences, tokens, heads, head_dim]; Gemma 3 applies its norms with the heads in front of the tokens."""
    if heads.ndim == 4 and heads.shape[1] != TOKENS:
        heads = heads.transpose(1, 2)
    return heads.reshape(SEQUENCES, TOKENS, -1, head_dim).numpy()


def key_source(model: torch.nn.Module, config: transformers.PreTrainedConfig) -> torch.nn.Module:
    """The attention whose keys the last layer reads."""
    own = [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "k_proj")]
    return [attention for attention in own if attention.layer_type == config.layer_types[-1]][-1]


def frequencies(rotary: torch.nn.Module) -> dict[str, np.ndarray]:
    names = {"inv_freq": "", "full_attention_inv_freq": "full_", "sliding_attention_inv_freq": "sliding_"}
    found = {label: getattr(rotary, name, None) for name, label in names.items()}
    return {f"{label}inverse_frequencies": value.numpy() for label, value in found.items() if value is not None}


def hub_config(saved: dict[str, object], hub: dict[str, object]) -> dict[str, object]:
    """A multimodal config as it is published: the text part nested, and in the spelling of its time (`hub`)."""
    dropped = ("per_layer_config", "rope_parameters", "layer_types", "architectures")
    text = {key: value for key, value in saved.items() if key not in dropped} | hub
    return {"model_type": str(saved["model_type"]).removesuffix("_text"), "eos_token_id": [2, 3], "text_config": text}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # With heads of 16, this leaves pairs in all three bands: kept, blended, divided.
    "original_max_position_embeddings": 128,
}
_S, _F = "sliding_attention", "full_attention"
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "layer_types": [_S, _F, _S]}
GEMMA3_MULTIMODAL = {
    **GEMMA3,
    "rope_parameters": {
        _F: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        _S: {"rope_type": "default", "rope_theta": 1e4},
    },
    "hub": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
    "prefix": "language_model.model.",
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 8,
    "layer_types": [_S, _F, _S, _F],
    "final_logit_softcapping": 3.0,  # small enough to bend the logits of a tiny model
    "hidden_size_per_layer_input": 0,
}
GEMMA4_EXPERTS = {
    **GEMMA4,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 12,
    "hub": {
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "layer_types": [_S, _F, _S, _F],
        "rope_parameters": {
            _F: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            _S: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "prefix": "model.language_model.",
}
GEMMA4_PER_LAYER = {
    **GEMMA4,
    "attention_k_eq_v": False,
    "num_hidden_layers": 6,
    "layer_types": [_S, _F, _S, _F, _S, _F],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
}
MAKERS = {
    name: functools.partial(make, family, seed, options)
    for name, family, seed, options in [
        (
            "llama_tied",
            "Llama",
            10,
            {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
        ),
        (
            "llama_rope_scaled",
            "Llama",
            20,
            {"tie_word_embeddings": False, "head_dim": 16, "rope_parameters": LLAMA3_ROPE},
        ),
        ("llama_window", "Mistral", 30, {"tie_word_embeddings": False, "head_dim": 8, "sliding_window": 12}),
        (
            "qwen3",
            "Qwen3",
            40,
            {
                "tie_word_embeddings": False,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            },
        ),
        ("qwen3_tied", "Qwen3", 50, {"tie_word_embeddings": True, "head_dim": 8}),
        ("qwen2", "Qwen2", 60, {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
        ("gemma3", "Gemma3", 70, GEMMA3),
        ("gemma3_multimodal", "Gemma3", 80, GEMMA3_MULTIMODAL),
        ("gemma4", "Gemma4", 90, GEMMA4),
        ("gemma4_experts", "Gemma4", 100, GEMMA4_EXPERTS),
        ("gemma4_per_layer", "Gemma4", 110, GEMMA4_PER_LAYER),
    ]
}
