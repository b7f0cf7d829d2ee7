"""Names and shapes of every parameter: the one table that loading, checking, quantising and random models go by.

Matrices are `[out, in]`; those of experts stand below each other. Names are ours; `checkpoints` maps the names of each
source format to them.
"""

from __future__ import annotations

import dataclasses

from dflash_jax.models.config import DrafterConfig, LayerConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Shape of one parameter and whether its format may change: norms and biases always stay f32."""

    shape: tuple[int, ...]
    matrix: bool = False


def target_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of a target or scorer, in the order in which a forward pass meets them."""
    hidden = config.hidden_size
    table = {"embed": Parameter((config.vocab_size, hidden), matrix=True)}
    if config.per_layer_width:
        packed = config.num_layers * config.per_layer_width
        table |= {
            "per_layer.embed": Parameter((config.per_layer_vocab, packed), matrix=True),
            "per_layer.projection": Parameter((packed, hidden), matrix=True),
            "per_layer.norm": Parameter((config.per_layer_width,)),
        }
    for index, layer in enumerate(config.layers):
        names = _attention(config, layer) | _mlp(config, layer)
        if config.layer_scalar:
            names["scalar"] = Parameter((1,))
        table |= {f"layers.{index}.{name}": parameter for name, parameter in names.items()}
    table["final_norm"] = Parameter((hidden,))
    if not config.tied_embeddings:
        table["lm_head"] = Parameter((config.vocab_size, hidden), matrix=True)
    return table


def _attention(config: ModelConfig, layer: LayerConfig) -> dict[str, Parameter]:
    hidden = config.hidden_size
    q_width, kv_width = config.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    widths = {"q": q_width}
    if layer.kv_source is None:
        widths["k"] = kv_width
        if not layer.values_are_keys:
            widths["v"] = kv_width
    names = {"attention_norm": Parameter((hidden,))}
    names |= {f"attention.{name}": Parameter((width, hidden), matrix=True) for name, width in widths.items()}
    names["attention.o"] = Parameter((hidden, q_width), matrix=True)
    if config.attention_bias:
        names |= {f"attention.{name}_bias": Parameter((width,)) for name, width in widths.items()}
    if config.output_bias:
        names["attention.o_bias"] = Parameter((hidden,))
    if config.qk_norm:
        names |= {f"attention.{name}_norm": Parameter((layer.head_dim,)) for name in "qk" if name in widths}
    if config.sandwich_norms:
        names["attention_post_norm"] = Parameter((hidden,))
    return names


def _mlp(config: ModelConfig, layer: LayerConfig) -> dict[str, Parameter]:
    hidden, width = config.hidden_size, layer.mlp_width
    names = {
        "mlp_norm": Parameter((hidden,)),
        "mlp.gate": Parameter((width, hidden), matrix=True),
        "mlp.up": Parameter((width, hidden), matrix=True),
        "mlp.down": Parameter((hidden, width), matrix=True),
    }
    if config.experts:
        count, narrow = config.experts.count, config.experts.width
        names |= {
            "mlp.dense_post_norm": Parameter((hidden,)),
            "experts.norm": Parameter((hidden,)),
            "experts.router": Parameter((count, hidden)),
            "experts.router_scale": Parameter((hidden,)),
            "experts.scale": Parameter((count,)),
            "experts.gate_up": Parameter((count * 2 * narrow, hidden), matrix=True),
            "experts.down": Parameter((count * hidden, narrow), matrix=True),
            "experts.post_norm": Parameter((hidden,)),
        }
    if config.sandwich_norms:
        names["mlp_post_norm"] = Parameter((hidden,))
    if config.per_layer_width:
        names |= {
            "per_layer.gate": Parameter((config.per_layer_width, hidden), matrix=True),
            "per_layer.out": Parameter((hidden, config.per_layer_width), matrix=True),
            "per_layer.post_norm": Parameter((hidden,)),
        }
    return names


def drafter_parameters(config: DrafterConfig) -> dict[str, Parameter]:
    """Every parameter of a drafter; 3 + 11 per layer of DFlash 1."""
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
        if config.convolution_group:
            corrections = 4 * hidden // config.convolution_group
            for sublayer in ("attention", "mlp"):
                names[f"{sublayer}_convolution.taps"] = Parameter((4, hidden))
                names[f"{sublayer}_convolution.corrections"] = Parameter((corrections, hidden), matrix=True)
        table |= {f"layers.{index}.{name}": parameter for name, parameter in names.items()}
    table["final_norm"] = Parameter((hidden,))
    if config.path_rank:
        table |= {
            "path.previous": Parameter((config.path_rank, hidden), matrix=True),
            "path.mix": Parameter((config.path_rank, hidden), matrix=True),
            "path.out": Parameter((hidden, config.path_rank), matrix=True),
        }
    return table
