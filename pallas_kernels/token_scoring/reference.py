"""Attention mass per prompt token, in two walks over the pages: softmax statistics first, probabilities second."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_scores(
    queries: Float[Array, "R H D"],
    key_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, " P"],
    length: Int[Array, ""],
    *,
    page_size: int,
    scale: float,
    reduce: str = "mean",
) -> Float[Array, " scores"]:
    """See `api.token_scores`."""
    rows, heads, head_dim = queries.shape
    kv_heads = key_pool.shape[1]
    group = heads // kv_heads
    dtype = key_pool.dtype
    pages = key_pool.reshape(-1, page_size, kv_heads, head_dim)
    grouped = (queries.astype(jnp.float32) * scale).astype(dtype).reshape(rows, kv_heads, group, head_dim)
    grouped = grouped.transpose(1, 0, 2, 3).reshape(kv_heads, rows * group, head_dim)

    def page_scores(page: Array) -> Float[Array, "kv_heads rows*group page"]:
        keys = jax.lax.dynamic_index_in_dim(pages, page_table[page], axis=0, keepdims=False).transpose(1, 0, 2)
        scores = jax.lax.dot_general(grouped, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        index = page * page_size + jnp.arange(page_size, dtype=jnp.int32)
        return jnp.where((index < length)[None, None, :], scores, -jnp.inf)

    def gather(page: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        highest, total = state
        scores = page_scores(page)
        # Every visited page holds a token below length, so no maximum is -inf.
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=2))
        return new_highest, total * jnp.exp(highest - new_highest) + jnp.sum(
            jnp.exp(scores - new_highest[..., None]), axis=2
        )

    end_page = jnp.minimum((length + page_size - 1) // page_size, page_table.shape[0])
    shape = (kv_heads, rows * group)
    start = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32))
    highest, total = jax.lax.fori_loop(0, end_page, gather, start)

    def emit(page: Array, out: Array) -> Array:
        mass = jnp.exp(page_scores(page) - highest[..., None]) / total[..., None]
        by_row = mass.reshape(kv_heads, rows, group, page_size)
        by_row = jnp.mean(by_row, axis=(0, 2)) if reduce == "mean" else jnp.max(by_row, axis=(0, 2))
        return jax.lax.dynamic_update_slice(out, jnp.mean(by_row, axis=0), (page * page_size,))

    return jax.lax.fori_loop(0, end_page, emit, jnp.zeros(page_table.shape[0] * page_size, jnp.float32))
