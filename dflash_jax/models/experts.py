"""Mixture of experts (Gemma 4 26B-A4B): a router picks a few small gated MLPs for every row."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dflash_jax.models.config import ModelConfig
from dflash_jax.models.layers import ACTIVATIONS, RMSNorm, Weight, dense
from pallas_kernels.grouped_matmul.api import grouped_matmul


class Experts(nnx.Module):
    """Router and experts with their norms; the router's own norm has no weight.

    Weights of the chosen experts sum to one before each expert's scale is applied.
    """

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig) -> None:
        if config.experts is None:
            raise ValueError("this config has no experts")
        norm = {"eps": config.norm_eps, "offset": config.norm_offset}
        self.norm = RMSNorm(dense(parameters["norm"]), **norm)
        self.router_norm = RMSNorm(None, eps=config.norm_eps)
        self.router = nnx.Param(dense(parameters["router"]))
        self.router_scale = nnx.Param(dense(parameters["router_scale"]) * config.hidden_size**-0.5)
        self.scale = nnx.Param(dense(parameters["scale"]))
        self.gate_up = nnx.Param(parameters["gate_up"])
        self.down = nnx.Param(parameters["down"])
        self.post_norm = RMSNorm(dense(parameters["post_norm"]), **norm)
        self.config = config.experts
        self.activation = config.activation

    def __call__(self, x: Float[Array, "slots rows dim"]) -> Float[Array, "slots rows dim"]:
        """`x` is the residual stream before the feed-forward norm."""
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self._route(rows)
        groups = {"groups": self.config.count}
        activation = ACTIVATIONS[self.activation]
        narrow = grouped_matmul(self.norm(rows), self.gate_up.get_value(), chosen, activation=activation, **groups)
        each = narrow.reshape(-1, narrow.shape[-1])  # [rows * active, width]
        parts = grouped_matmul(each, self.down.get_value(), chosen.reshape(-1, 1), **groups)
        back = parts.reshape(*chosen.shape, -1)
        mixed = jnp.sum(back * weights[:, :, None].astype(back.dtype), axis=1)
        return self.post_norm(mixed).reshape(x.shape)

    def _route(self, rows: Float[Array, "rows dim"]) -> tuple[Float[Array, "rows active"], Array]:
        """Weights f32 and numbers of the experts that each row goes to. Computed in f32: a near tie picks an expert."""
        normed = self.router_norm(rows.astype(jnp.float32)) * self.router_scale.get_value()[None, :]
        scores = jnp.einsum("rd,ed->re", normed, self.router.get_value(), precision=jax.lax.Precision.HIGHEST)
        best, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), self.config.active)
        weights = best / jnp.sum(best, axis=-1, keepdims=True)
        return weights * jnp.take(self.scale.get_value(), chosen), chosen
