"""W8 on a CPU: activations are rounded to 8 bits per row, and the dot is exact in int32.

Three times faster than f32 there (int8 dot products in hardware, a quarter of the bytes), and since integer sums do not depend
on their order, a row's result does not depend on how many rows are beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantised_matmul.weights import W8


def matmul(x: Float[Array, "... K"], weight: W8) -> Float[Array, "... N"]:
    """`x @ weight.T` in the dtype of x, with x rounded to 127 steps of its row's largest magnitude."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    count = rows.shape[0]
    steps = jnp.max(jnp.abs(rows), axis=1, keepdims=True) / 127.0  # [rows, 1]
    rounded = jnp.round(rows / jnp.where(steps == 0, 1.0, steps)).astype(jnp.int8)
    if count == 1:
        # XLA's CPU path for a single int8 row is 8-10 times slower than that for two.
        rounded = jnp.pad(rounded, ((0, 1), (0, 0)))
    sums = jax.lax.dot_general(rounded, weight.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    product = sums[:count].astype(jnp.float32) * steps * weight.scales[None, :]
    return product.astype(x.dtype).reshape(*x.shape[:-1], -1)
