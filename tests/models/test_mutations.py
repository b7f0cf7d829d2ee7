"""Every mistake that is easily made in a port of these families shows in the goldens: a mutated decoder is far off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from dflash_jax.engine.target import Target
from dflash_jax.models.config import LayerConfig, ModelConfig, RopeConfig
from dflash_jax.models.decoder import Decoder

LEAST = 0.05
"""A hundred times the tolerance of the comparison with transformers."""
Parameters = Mapping[str, Any]
Mutation = Callable[[ModelConfig, Parameters], tuple[ModelConfig, Parameters]]


def of_config(**changes: Any) -> Mutation:
    return lambda config, parameters: (dataclasses.replace(config, **changes), parameters)


def of_layers(change: Callable[[LayerConfig], dict[str, Any]]) -> Mutation:
    def mutate(config: ModelConfig, parameters: Parameters) -> tuple[ModelConfig, Parameters]:
        layers = tuple(dataclasses.replace(layer, **change(layer)) for layer in config.layers)
        return dataclasses.replace(config, layers=layers), parameters

    return mutate


def of_rope(change: Callable[[RopeConfig, int], dict[str, Any]]) -> Mutation:
    return of_layers(lambda layer: {"rope": dataclasses.replace(layer.rope, **change(layer.rope, layer.head_dim))})


def of_parameters(end: str, change: Callable[[Any, Parameters, str], Any]) -> Mutation:
    def mutate(config: ModelConfig, parameters: Parameters) -> tuple[ModelConfig, Parameters]:
        changed = {name: change(parameters[name], parameters, name) for name in parameters if name.endswith(end)}
        assert changed
        return config, {**parameters, **changed}

    return mutate


def swap_halves(config: ModelConfig, parameters: Parameters) -> tuple[ModelConfig, Parameters]:
    """Up before gate in every expert's matrix."""
    assert config.experts is not None
    shape = (config.experts.count, 2, config.experts.width, config.hidden_size)
    change = of_parameters(".gate_up", lambda weight, *_: weight.reshape(shape)[:, ::-1].reshape(weight.shape))
    return change(config, parameters)


def rope_over_rotated_dims(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """Exponents over the dims that turn instead of over the whole head."""
    return {} if rope.rotated_pairs is None else {"theta": rope.theta ** (head_dim / (2 * rope.rotated_pairs))}


def router_reads_the_normed(scale: Any, parameters: Parameters, name: str) -> Any:
    return scale * parameters[name.replace("router_scale", "norm")]


MUTATIONS: dict[tuple[str, str], Mutation] = {
    ("gemma4", "attention scale"): of_layers(lambda layer: {"attention_scale": layer.head_dim**-0.5}),
    ("gemma4", "no norm of v"): of_config(v_norm=False),
    ("gemma4", "no scalar of layers"): of_config(layer_scalar=False),
    ("gemma4", "no softcap"): of_config(final_softcap=None),
    ("gemma4", "window too wide"): of_layers(lambda layer: {"window": layer.window and layer.window + 1}),
    ("gemma4", "window too narrow"): of_layers(lambda layer: {"window": layer.window and layer.window - 1}),
    ("gemma4", "RoPE denominator"): of_rope(rope_over_rotated_dims),
    ("gemma4", "all pairs turn"): of_rope(lambda *_: {"rotated_pairs": None}),
    ("gemma4", "embeddings not scaled"): of_config(embedding_scale=1.0),
    ("gemma4", "activation"): of_config(activation="silu"),
    ("gemma4", "no norms of q and k"): of_config(qk_norm=False),
    ("gemma4", "norms of Gemma 3"): of_config(norm_offset=1.0),
    ("gemma4_experts", "no scale of experts"): of_parameters("experts.scale", lambda scale, *_: jnp.ones_like(scale)),
    ("gemma4_experts", "no scale of the router"): of_parameters("router_scale", lambda scale, *_: jnp.ones_like(scale)),
    ("gemma4_experts", "up before gate"): swap_halves,
    ("gemma4_experts", "router reads what experts read"): of_parameters("router_scale", router_reads_the_normed),
    ("gemma4_per_layer", "shared layers read the first layers"): of_layers(
        lambda layer: {} if layer.kv_source is None else {"kv_source": layer.kv_source % 2}
    ),
    ("gemma4_per_layer", "order of per-layer vectors"): of_parameters(
        "per_layer.projection", lambda weight, *_: jnp.roll(weight, 8, axis=0)
    ),
    ("gemma3", "norms of Gemma 4"): of_config(norm_offset=0.0),
    ("gemma3", "attention scale"): of_layers(lambda layer: {"attention_scale": layer.head_dim**-0.5}),
    ("gemma3_multimodal", "no linear factor"): of_rope(lambda *_: {"linear_factor": 1.0}),
    ("qwen3", "no norms of q and k"): of_config(qk_norm=False),
    ("qwen2", "no biases"): of_config(attention_bias=False),
    ("llama_rope_scaled", "no llama3 scaling"): of_rope(lambda *_: {"llama3_factor": None}),
}


def error(folder: Path, mutate: Mutation) -> float:
    """Largest difference from the golden's logits after a mutation."""
    checkpoint = checkpoints.load(folder)
    assert isinstance(checkpoint.config, ModelConfig)
    config, parameters = mutate(checkpoint.config, checkpoint.parameters)
    with np.load(folder / "expected.npz") as expected:
        ids, logits = expected["input_ids"], expected["logits"]
    found = Target(Decoder(config, parameters, dtype=jnp.float32)).logits(jnp.asarray(ids, jnp.int32))
    return float(np.abs(np.asarray(found) - logits).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", MUTATIONS, ids=" ".join)
def test_a_mistake_shows(goldens: Path, case: tuple[str, str]) -> None:
    assert error(goldens / case[0], MUTATIONS[case]) > LEAST


@pytest.mark.parametrize("name", sorted({name for name, _ in MUTATIONS}))
def test_without_a_mistake_there_is_no_error(goldens: Path, name: str) -> None:
    assert error(goldens / name, lambda config, parameters: (config, parameters)) < LEAST / 50
