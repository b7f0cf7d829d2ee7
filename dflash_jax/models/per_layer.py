"""Per-layer embeddings (Gemma 4 E2B and E4B): each layer gets a small vector of its own for every token."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import ModelConfig
from dflash_jax.models.layers import ACTIVATIONS, Linear, RMSNorm, Stream, Weight, dense
from pallas_kernels.quantised_matmul import api as quantised_matmul


class PerLayerEmbedding(nnx.Module):
    """What all layers get: half from a table of its own, half projected from the token's (scaled) embedding."""

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig) -> None:
        self.table = nnx.Param(parameters["embed"])
        self.projection = Linear(parameters["projection"])
        self.norm = RMSNorm(dense(parameters["norm"]), eps=config.norm_eps, offset=config.norm_offset)
        self.width = config.per_layer_width
        self.projection_scale = config.hidden_size**-0.5

    def __call__(
        self, tokens: Int[Array, "slots rows"], x: Float[Array, "slots rows dim"]
    ) -> Float[Array, "slots rows layers width"]:
        shape = (*tokens.shape, -1, self.width)
        projected = self.projection(x) * jnp.asarray(self.projection_scale, x.dtype)
        rows = quantised_matmul.take_rows(self.table.get_value(), tokens, projected.shape[-1])
        rows = rows.astype(x.dtype) * jnp.asarray(self.width**0.5, x.dtype)
        mixed = self.norm(projected.reshape(shape)) + rows.reshape(shape)
        return mixed * jnp.asarray(2**-0.5, x.dtype)


class PerLayerGate(nnx.Module):
    """What one layer adds to the residual stream: its vector, gated by the stream and projected back."""

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig) -> None:
        self.gate = Linear(parameters["gate"])
        self.out = Linear(parameters["out"])
        self.post_norm = RMSNorm(dense(parameters["post_norm"]), eps=config.norm_eps, offset=config.norm_offset)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "slots rows dim"], vector: Float[Array, "slots rows width"]) -> Stream:
        """The stream `x`, with that to be added."""
        return Stream(x, self.out.parts(ACTIVATIONS[self.activation](self.gate(x)) * vector), self.post_norm)
