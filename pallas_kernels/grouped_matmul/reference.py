"""Grouped matmul by XLA's ragged dot, on dense weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantised_matmul.weights import W4, W8, Weight, dequantise


def grouped_matmul(x: Float[Array, "M K"], weight: Weight, sizes: Int[Array, " G"]) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`."""
    columns = x.shape[-1]
    matrix = dequantise(weight, columns) if isinstance(weight, W8 | W4) else weight
    stacked = matrix.astype(x.dtype).reshape(sizes.shape[0], -1, columns).transpose(0, 2, 1)
    product = jax.lax.ragged_dot(x, stacked, sizes, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
