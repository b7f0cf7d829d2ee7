"""Which experts rows go to, in plain jnp."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.residual_norm.reference import rms_norm


class Choice(NamedTuple):
    """The experts of each row, what their results are weighted with (f32), and what they read: the row, normed."""

    chosen: Int[Array, "rows active"]
    weights: Float[Array, "rows active"]
    normed: Float[Array, "rows dim"]


def choose_experts(
    x: Float[Array, "rows dim"],
    router: Float[Array, "experts dim"],
    router_scale: Float[Array, " dim"],
    expert_scale: Float[Array, " experts"],
    scale: Float[Array, " dim"],
    source: Int[Array, " rows"] | None,
    *,
    active: int,
    eps: float,
) -> Choice:
    """See `api.choose_experts`."""
    rows = x if source is None else jnp.take(x, source, axis=0, mode="clip")
    for_router = rms_norm(rows.astype(jnp.float32), router_scale, eps=eps)
    scores = jnp.einsum("rd,ed->re", for_router, router, precision=jax.lax.Precision.HIGHEST)
    best, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), active)
    weights = best / jnp.sum(best, axis=-1, keepdims=True) * jnp.take(expert_scale, chosen)
    return Choice(chosen, weights, rms_norm(rows, scale, eps=eps))
