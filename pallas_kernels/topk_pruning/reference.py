"""Which prompt tokens survive: whole chunks by smoothed score, under a hard budget."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def select_tokens(
    scores: Float[Array, " S"],
    droppable: Bool[Array, " S"],
    length: Int[Array, ""],
    budget: Int[Array, ""],
    *,
    chunk: int = 32,
    smooth: int = 13,
) -> Bool[Array, " S"]:
    """See `api.select_tokens`."""
    size = scores.shape[0]
    inside = jnp.arange(size, dtype=jnp.int32) < length
    candidate = droppable & inside
    smoothed = average_pool(jnp.where(inside, scores, 0.0), inside, smooth)

    padding = -size % chunk
    by_chunk = jnp.pad(candidate, (0, padding)).reshape(-1, chunk)
    counts = jnp.sum(by_chunk, axis=1, dtype=jnp.int32)
    sums = jnp.sum(jnp.where(by_chunk, jnp.pad(smoothed, (0, padding)).reshape(-1, chunk), 0.0), axis=1)
    means = jnp.where(counts > 0, sums / jnp.maximum(counts, 1).astype(jnp.float32), -jnp.inf)
    order = jnp.argsort(-means, stable=True)
    fits = jnp.cumsum(counts[order], dtype=jnp.int32) <= budget
    chosen = jnp.zeros(counts.shape, jnp.bool_).at[order].set(fits)
    # Not even the best chunk fits: its best tokens are better than nothing.
    best = candidate & (jnp.arange(size, dtype=jnp.int32) // chunk == order[0])
    ranked = jnp.argsort(jnp.where(best, -smoothed, jnp.inf), stable=True)
    rank = jnp.zeros(size, jnp.int32).at[ranked].set(jnp.arange(size, dtype=jnp.int32))
    few = best & (rank < budget) & ~fits[0]

    kept = inside & (~droppable | jnp.repeat(chosen, chunk)[:size] | few)
    broken = jnp.any(jnp.isnan(scores) & inside)
    return jnp.where(broken, inside, kept)


def average_pool(values: Float[Array, " S"], inside: Bool[Array, " S"], width: int) -> Float[Array, " S"]:
    """Mean over a centred window of the tokens that are inside; `values` are zero elsewhere."""

    def window_sum(x: Array) -> Array:
        return jax.lax.reduce_window(x, jnp.float32(0), jax.lax.add, (width,), (1,), (((width - 1) // 2, width // 2),))

    return window_sum(values) / jnp.maximum(window_sum(inside.astype(jnp.float32)), 1.0)


def compact(keep: Bool[Array, " S"]) -> tuple[Int[Array, " S"], Int[Array, ""]]:
    """See `api.compact`."""
    size = keep.shape[0]
    place = jnp.cumsum(keep, dtype=jnp.int32) - 1
    indices = jnp.zeros(size, jnp.int32)
    indices = indices.at[jnp.where(keep, place, size)].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    return indices, jnp.sum(keep, dtype=jnp.int32)
