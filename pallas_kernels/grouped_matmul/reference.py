"""Grouped matmul by XLA's ragged dot, on dense weights and rows sorted by group."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantised_matmul.weights import W4, W8, Weight, dequantise


def grouped_matmul(
    x: Float[Array, "R K"],
    weight: Weight,
    chosen: Int[Array, "R A"],
    *,
    groups: int,
    activation: Callable[[Array], Array] | None = None,
) -> Float[Array, "R A N"]:
    """See `api.grouped_matmul`."""
    flat = jnp.clip(chosen.reshape(-1), 0, groups - 1)
    order = jnp.argsort(flat, stable=True)  # [R * A], by group
    product = _by_group(jnp.take(x, order // chosen.shape[1], axis=0), weight, jnp.bincount(flat, length=groups))
    if activation is not None:
        gate, up = jnp.split(product, 2, axis=-1)
        product = activation(gate) * up
    return jnp.take(product, jnp.argsort(order), axis=0).reshape(*chosen.shape, -1)


def _by_group(x: Float[Array, "M K"], weight: Weight, sizes: Int[Array, " G"]) -> Float[Array, "M N"]:
    """The first `sizes[0]` rows are of group 0, the next `sizes[1]` of group 1, and so on."""
    columns = x.shape[-1]
    matrix = dequantise(weight, columns) if isinstance(weight, W8 | W4) else weight
    stacked = matrix.astype(x.dtype).reshape(sizes.shape[0], -1, columns).transpose(0, 2, 1)
    product = jax.lax.ragged_dot(x, stacked, sizes, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
