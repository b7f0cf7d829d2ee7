"""Random parameters of any model, for tests and for checks on a device without real weights."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.parameters import Parameter, drafter_parameters, target_parameters


def random_target(config: ModelConfig, seed: int = 0) -> dict[str, Array]:
    """f32 parameters of a target by their canonical names; activations keep their size from layer to layer."""
    return _random(target_parameters(config), seed)


def random_drafter(config: DrafterConfig, seed: int = 0) -> dict[str, Array]:
    """f32 parameters of a drafter by their canonical names."""
    return _random(drafter_parameters(config), seed)


def _random(table: Mapping[str, Parameter], seed: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    parameters = {}
    for name, parameter in table.items():
        noise = generator.standard_normal(parameter.shape, np.float32)
        if parameter.matrix:
            # Small embeddings: with a tied head, large ones would make every token predict itself.
            value = noise * np.float32(0.03) if name == "embed" else noise / np.sqrt(np.float32(parameter.shape[-1]))
        else:
            value = noise * np.float32(0.1) + np.float32(not name.endswith("_bias"))
        parameters[name] = jnp.asarray(value)
    return parameters
