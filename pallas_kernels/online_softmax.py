"""The sums of attention over blocks of keys, one block after the other: what Triton kernels over paged KV share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

LEAST_TILE = 16
"""Tensor cores take 16 rows."""
TILE_NUMBERS = 16_384
"""A tile's sums are so many f32 numbers at most, or they spill."""
STEP_BYTES = 131_072
"""What a step of a loop reads at most: it lies in shared memory (227 KiB on an H100) beside the tile."""
LOWEST = -1e30
"""Stands for minus infinity: a difference of two of them is a number."""

Sums = tuple[Float[Array, "_lines 1"], Float[Array, "_lines 1"], Float[Array, "_lines _D"]]
"""Of each line, over the keys so far: the largest score, weights relative to it, and values mixed by these weights.

Lines are rows, or with `keys_axis` 0 columns: then all of it is transposed.
"""


def no_sums(lines: int, width: int, *, keys_axis: int = 1) -> Sums:
    """The sums before the first key."""

    def filled(size: int, number: float) -> Array:
        return jnp.full((lines, size) if keys_axis else (size, lines), number, jnp.float32)

    return filled(1, LOWEST), filled(1, 0.0), filled(width, 0.0)


def add_keys(
    sums: Sums,
    scores: Float[Array, "_lines _keys"],
    seen: Bool[Array, "_lines _keys"] | None,
    value: Float[Array, "keys D"],
    *,
    keys_axis: int = 1,
) -> Sums:
    """The sums with a block of keys, of which each line takes those that it has `seen`, or all."""
    highest, total, mixed = sums
    if seen is not None:
        scores = jnp.where(seen, scores, LOWEST)
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=keys_axis, keepdims=True))
    weights = jnp.exp(scores - new_highest)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    keep = jnp.exp(highest - new_highest)
    narrow, precision = weights.astype(value.dtype), precision_of(value)
    if keys_axis:
        part = plt.dot(narrow, value, precision=precision)
    else:
        part = plt.dot(value, narrow, trans_a=True, precision=precision)
    return new_highest, total * keep + jnp.sum(weights, axis=keys_axis, keepdims=True), mixed * keep + part


def step_size(most: int, width: int, dtype: DTypeLike) -> int:
    """How many keys a step reads, a power of two: `most`, or fewer if `width` numbers of each are too many bytes."""
    fitting = STEP_BYTES // (width * jnp.dtype(dtype).itemsize)
    return min(most, 1 << (fitting.bit_length() - 1))


def precision_of(array: Array) -> jax.lax.Precision | None:
    """Of products with this array: f32 is not to be rounded to TF32."""
    return jax.lax.Precision.HIGHEST if array.dtype == jnp.float32 else None
