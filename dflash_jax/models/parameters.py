"""Names and shapes of every parameter: the one table that loading, checking, quantising and random models go by.

Matrices are `[out, in]`. Names are ours; `checkpoints` maps the names of each source format to them.
"""

from __future__ import annotations

import dataclasses

from dflash_jax.models.config import DrafterConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Shape of one parameter and whether its format may change: norms and biases always stay f32."""

    shape: tuple[int, ...]
    matrix: bool = False


def target_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of a target or scorer, in the order in which a forward pass meets them."""
    hidden = config.hidden_size
    table = {"embed": Parameter((config.vocab_size, hidden), matrix=True)}
    for index, layer in enumerate(config.layers):
        q_width, kv_width = config.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        names = {
            "attention_norm": Parameter((hidden,)),
            "attention.q": Parameter((q_width, hidden), matrix=True),
            "attention.k": Parameter((kv_width, hidden), matrix=True),
            "attention.v": Parameter((kv_width, hidden), matrix=True),
            "attention.o": Parameter((hidden, q_width), matrix=True),
            "mlp_norm": Parameter((hidden,)),
            "mlp.gate": Parameter((layer.mlp_width, hidden), matrix=True),
            "mlp.up": Parameter((layer.mlp_width, hidden), matrix=True),
            "mlp.down": Parameter((hidden, layer.mlp_width), matrix=True),
        }
        if config.attention_bias:
            names |= {
                f"attention.{name}_bias": Parameter((width,))
                for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
            }
        if config.qk_norm:
            names |= {f"attention.{name}_norm": Parameter((layer.head_dim,)) for name in "qk"}
        if config.sandwich_norms:
            names |= {"attention_post_norm": Parameter((hidden,)), "mlp_post_norm": Parameter((hidden,))}
        table |= {f"layers.{index}.{name}": parameter for name, parameter in names.items()}
    table["final_norm"] = Parameter((hidden,))
    if not config.tied_embeddings:
        table["lm_head"] = Parameter((config.vocab_size, hidden), matrix=True)
    return table


def drafter_parameters(config: DrafterConfig) -> dict[str, Parameter]:
    """Every parameter of a drafter; 3 + 11 per layer."""
    hidden = config.hidden_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    table = {
        "feature_projection": Parameter((hidden, len(config.target_layers) * hidden), matrix=True),
        "feature_norm": Parameter((hidden,)),
    }
    for index in range(config.num_layers):
        names = {
            "attention_norm": Parameter((hidden,)),
            "attention.q": Parameter((q_width, hidden), matrix=True),
            "attention.k": Parameter((kv_width, hidden), matrix=True),
            "attention.v": Parameter((kv_width, hidden), matrix=True),
            "attention.o": Parameter((hidden, q_width), matrix=True),
            "attention.q_norm": Parameter((config.head_dim,)),
            "attention.k_norm": Parameter((config.head_dim,)),
            "mlp_norm": Parameter((hidden,)),
            "mlp.gate": Parameter((config.mlp_width, hidden), matrix=True),
            "mlp.up": Parameter((config.mlp_width, hidden), matrix=True),
            "mlp.down": Parameter((hidden, config.mlp_width), matrix=True),
        }
        table |= {f"layers.{index}.{name}": parameter for name, parameter in names.items()}
    table["final_norm"] = Parameter((hidden,))
    return table
