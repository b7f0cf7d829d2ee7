"""What a feed-forward block with experts adds up, in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.residual_norm.reference import rms_norm, sum_of


def expert_sum(
    back: Float[Array, "rows active dim"],
    weights: Float[Array, "rows active"],
    scale: Float[Array, " dim"],
    parts: Float[Array, "parts rows dim"],
    parts_scale: Float[Array, " dim"],
    *,
    eps: float,
) -> Float[Array, "rows dim"]:
    """See `api.expert_sum`."""
    mixed = jnp.sum(back * weights[:, :, None].astype(back.dtype), axis=1)
    return rms_norm(sum_of(parts, back.dtype), parts_scale, eps=eps) + rms_norm(mixed, scale, eps=eps)
