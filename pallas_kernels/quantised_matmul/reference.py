"""The plain linear map: make the weight dense, then one dot with f32 accumulation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantised_matmul.weights import W4, W8, Weight, dequantise


def matmul(x: Float[Array, "... K"], weight: Weight) -> Float[Array, "... N"]:
    """`x @ weight.T` in the dtype of x."""
    matrix = dequantise(weight, x.shape[-1]) if isinstance(weight, W8 | W4) else weight
    rows = x.reshape(-1, x.shape[-1])
    # XLA's CPU path for one row of 16-bit operands is 8-10 times slower than that for two.
    lonely = rows.shape[0] == 1 and x.dtype != jnp.float32
    operand = jnp.pad(rows, ((0, 1), (0, 0))) if lonely else rows
    product = jax.lax.dot_general(
        operand, matrix.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product[: rows.shape[0]].astype(x.dtype).reshape(*x.shape[:-1], -1)
