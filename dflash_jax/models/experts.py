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
        count, active = len(rows), self.config.active
        order = jnp.argsort(chosen.reshape(-1), stable=True)  # [rows * active], by expert
        sizes = jnp.bincount(chosen.reshape(-1), length=self.config.count)
        sorted_rows = jnp.take(self.norm(rows), order // active, axis=0)
        gate, up = jnp.split(grouped_matmul(sorted_rows, self.gate_up.get_value(), sizes), 2, axis=-1)
        narrow = ACTIVATIONS[self.activation](gate) * up
        parts = grouped_matmul(narrow, self.down.get_value(), sizes)
        back = jnp.take(parts, jnp.argsort(order), axis=0).reshape(count, active, -1)
        mixed = jnp.sum(back * weights[:, :, None].astype(back.dtype), axis=1)
        return self.post_norm(mixed).reshape(x.shape)

    def _route(self, rows: Float[Array, "rows dim"]) -> tuple[Float[Array, "rows active"], Array]:
        """Weights f32 and numbers of the experts that each row goes to. Computed in f32: a near tie picks an expert."""
        normed = self.router_norm(rows.astype(jnp.float32)) * self.router_scale.get_value()[None, :]
        scores = jnp.einsum("rd,ed->re", normed, self.router.get_value(), precision=jax.lax.Precision.HIGHEST)
        best, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), self.config.active)
        weights = best / jnp.sum(best, axis=-1, keepdims=True)
        return weights * jnp.take(self.scale.get_value(), chosen), chosen
