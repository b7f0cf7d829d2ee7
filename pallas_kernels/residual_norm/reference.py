"""Adding to the residual stream and RMSNorm in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... dim"], scale: Float[Array, " dim"] | None, *, eps: float) -> Float[Array, "... dim"]:
    """`x / rms(x) * scale` over the last axis, computed in f32, in the dtype of x."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(_mean_square(wide) + eps)
    if scale is not None:
        normed = normed * jnp.expand_dims(scale, range(x.ndim - 1))
    return normed.astype(x.dtype)


def residual_norm(
    parts: Float[Array, "parts rows dim"],
    stream: Float[Array, "rows dim"],
    scale: Float[Array, " dim"],
    *,
    post_scale: Float[Array, " dim"] | None,
    factor: Float[Array, " 1"] | None,
    eps: float,
) -> tuple[Float[Array, "rows dim"], Float[Array, "rows dim"]]:
    """See `api.residual_norm`."""
    stream = add(parts, stream, post_scale=post_scale, factor=factor, eps=eps)
    return stream, rms_norm(stream, scale, eps=eps)


def add(
    parts: Float[Array, "parts ... dim"],
    stream: Float[Array, "... dim"],
    *,
    post_scale: Float[Array, " dim"] | None,
    factor: Float[Array, " 1"] | None,
    eps: float,
) -> Float[Array, "... dim"]:
    """The stream alone."""
    update = sum_of(parts, stream.dtype)
    if post_scale is not None:
        update = rms_norm(update, post_scale, eps=eps)
    stream = stream + update
    return stream if factor is None else stream * jnp.expand_dims(factor.astype(stream.dtype), range(stream.ndim - 1))


def sum_of(parts: Float[Array, "parts ... dim"], dtype: jnp.dtype) -> Float[Array, "... dim"]:
    """The parts of a linear map put together."""
    return (parts[0] if len(parts) == 1 else jnp.sum(parts, axis=0)).astype(dtype)


def _mean_square(x: Float[Array, "... dim"]) -> Float[Array, "... 1"]:
    """Row means whose bits do not depend on the number of rows: XLA sums fewer than 8 rows in another order (CPU)."""
    rows = x.reshape(-1, x.shape[-1])
    padded = jnp.pad(rows, ((0, max(0, 8 - len(rows))), (0, 0)))
    return jnp.mean(jnp.square(padded), axis=-1)[: len(rows)].reshape(*x.shape[:-1], 1)
