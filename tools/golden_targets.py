"""Goldens of the target families, from transformers.

expected.npz holds `input_ids` i64[sequences, tokens], `hidden_states` f32[layers + 1, sequences, tokens, dim] (the
embeddings, then the residual stream after each layer; the last one has passed the final norm), `logits` f32[sequences,
tokens, vocab], and the same logits for RoPE `gap_positions` that jump, as in a pruned prompt: `gap_logits`; `queries`
and `keys` of the last layer f32[sequences, tokens, heads, head_dim] before RoPE; `inverse_frequencies` f32[head_dim /
2] is what RoPE turns by.
"""

from __future__ import annotations

import functools
from pathlib import Path

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
    config = getattr(transformers, f"{family}Config")(**SHAPE, **options)
    model = randomise(getattr(transformers, f"{family}ForCausalLM")(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    input_ids = torch.randint(3, config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    steps = torch.randint(1, 4, (SEQUENCES, TOKENS), generator=generator)
    gap_positions = torch.cumsum(steps, dim=1)
    mask = torch.ones_like(input_ids)  # without it, transformers takes a jump in positions for a new packed document
    gaps = model(input_ids, attention_mask=mask, position_ids=gap_positions, use_cache=False)
    last, taken = model.model.layers[-1].self_attn, {}
    for letter in "qk":
        module = getattr(last, f"{letter}_norm", None) or getattr(last, f"{letter}_proj")
        module.register_forward_hook(lambda _module, _inputs, output, letter=letter: taken.update({letter: output}))
    plain = model(input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    write(
        folder,
        model,
        config.to_diff_dict() | {"architectures": [f"{family}ForCausalLM"], "model_type": config.model_type},
        input_ids=input_ids.numpy(),
        hidden_states=torch.stack(plain.hidden_states).numpy(),
        logits=plain.logits.numpy(),
        gap_positions=gap_positions.numpy(),
        gap_logits=gaps.logits.numpy(),
        queries=taken["q"].reshape(SEQUENCES, TOKENS, -1, last.head_dim).numpy(),
        keys=taken["k"].reshape(SEQUENCES, TOKENS, -1, last.head_dim).numpy(),
        inverse_frequencies=model.model.rotary_emb.inv_freq.numpy(),
    )


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # With heads of 16, this leaves pairs in all three bands: kept, blended, divided.
    "original_max_position_embeddings": 128,
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
    ]
}
