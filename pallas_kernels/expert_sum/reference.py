"""What a feed-forward block with experts adds up, in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.residual_norm.reference import rms_norm, sum_of


def expert_sum(
    back: Float[Array, "places dim"],
    place: Int[Array, " choices"] | None,
    weights: Float[Array, "rows active"],
    scale: Float[Array, " dim"],
    parts: Float[Array, "parts rows dim"],
    parts_scale: Float[Array, " dim"],
    *,
    eps: float,
) -> Float[Array, "rows dim"]:
    """See `api.expert_sum`."""
    rows = (back if place is None else back[place]).reshape(*weights.shape, -1)
    mixed = jnp.sum(rows * weights[:, :, None].astype(back.dtype), axis=1)
    return rms_norm(sum_of(parts, back.dtype), parts_scale, eps=eps) + rms_norm(mixed, scale, eps=eps)
