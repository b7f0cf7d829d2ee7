"""Mixture of experts (Gemma 4 26B-A4B): a router picks a few small gated MLPs for every row."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import ModelConfig
from dflash_jax.models.layers import ACTIVATIONS, Parts, Weight, dense
from pallas_kernels.expert_choice.api import choose_experts
from pallas_kernels.expert_sum.api import expert_sum
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_products


class Experts(nnx.Module):
    """Router and experts with their norms, and the norm of the dense MLP that they are added to."""

    def __init__(self, parameters: Mapping[str, Weight], beside: Float[Array, " dim"], config: ModelConfig) -> None:
        if config.experts is None:
            raise ValueError("this config has no experts")

        def scale(weight: Weight) -> nnx.Param[Array]:
            return nnx.Param(dense(weight).astype(jnp.float32) + config.norm_offset)

        self.norm, self.post_norm = scale(parameters["norm"]), scale(parameters["post_norm"])
        self.beside_post_norm = scale(beside)
        self.router = nnx.Param(dense(parameters["router"]))
        self.router_scale = nnx.Param(dense(parameters["router_scale"]) * config.hidden_size**-0.5)
        self.scale = nnx.Param(dense(parameters["scale"]))
        self.gate_up = nnx.Param(parameters["gate_up"])
        self.down = nnx.Param(parameters["down"])
        self.config = config.experts
        self.activation = config.activation
        self.eps = config.norm_eps

    def __call__(
        self, x: Float[Array, "slots rows dim"], beside: Parts, source: Int[Array, " _all_rows"] | None
    ) -> Float[Array, "slots rows dim"]:
        """What experts and dense MLP add up to, each normed; `beside` has the parts of the latter.

        `x` is the residual stream before the feed-forward norm. Of all rows, the r-th is treated as the `source[r]`-th.
        """
        rows = x.reshape(-1, x.shape[-1])
        router = (self.router.get_value(), self.router_scale.get_value(), self.scale.get_value())
        chosen, weights, normed = choose_experts(
            rows, *router, self.norm.get_value(), source, active=self.config.active, eps=self.eps
        )
        groups, activation = self.config.count, ACTIVATIONS[self.activation]
        narrow = grouped_matmul(normed, self.gate_up.get_value(), chosen, groups=groups, activation=activation)
        each = narrow.reshape(-1, narrow.shape[-1])  # [rows * active, width]
        back, place = grouped_products(each, self.down.get_value(), chosen.reshape(-1, 1), groups=groups)
        both = expert_sum(
            back,
            place,
            weights,
            self.post_norm.get_value(),
            beside.reshape(-1, *rows.shape),
            self.beside_post_norm.get_value(),
            eps=self.eps,
        )
        return both.reshape(x.shape)
