"""W8 on a CPU: activations become two int8 numbers each, and the dots are exact in int32.

int8 dots run in hardware there: a row costs a fraction of an f32 row. One int8 per activation is not enough: a few huge
activations (the first token of a prompt has them) would leave nothing of the others in their row, and answers go wrong.
The second int8 holds what the first one rounded away, 15 bits together, and quality equals that of f32 activations.
Integer sums do not depend on their order, so a row's result does not depend on how many rows are beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantised_matmul.weights import W8

_FINE = 254.0
"""Fine steps in a coarse one: half a coarse step is 127 fine ones."""


def matmul(x: Float[Array, "... K"], weight: W8) -> Float[Array, "... N"]:
    """`x @ weight.T` in the dtype of x, with x rounded to 127 * 254 steps of its row's largest magnitude."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    count = rows.shape[0]
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)  # [rows, 1]
    steps = largest / 127.0
    scaled = rows / jnp.where(steps == 0, 1.0, steps)
    coarse = jnp.round(scaled)
    fine = jnp.round((scaled - coarse) * _FINE)
    operand = jnp.concatenate([coarse, fine]).astype(jnp.int8)  # [2 * rows, K]
    sums = jax.lax.dot_general(operand, weight.values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    wide = sums.astype(jnp.float32)
    product = (wide[:count] + wide[count:] / _FINE) * steps * weight.scales[None, :]
    return product.astype(x.dtype).reshape(*x.shape[:-1], -1)
