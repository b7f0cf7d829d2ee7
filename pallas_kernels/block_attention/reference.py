"""Attention of a few query rows per slot over paged KV, page by page with an online softmax, in plain jnp.

Pages are visited at fixed absolute positions and a page that a row does not see leaves that row's sums untouched, bit
for bit. So a row's result depends neither on how far its neighbours reach nor on what they hold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_attention(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    ring: bool = False,
    compact: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.block_attention`."""
    if queries.shape[1] == 1 and causal:
        # One row alone takes another path of XLA's CPU dot, with other bits; a second row keeps it on the common one.
        pair = jnp.concatenate([queries, queries], axis=1)
        sizes = {"page_size": page_size, "scale": scale, "window": window, "ring": ring, "compact": compact}
        return block_attention(pair, key_pool, value_pool, page_table, starts, **sizes)[:, :1]
    batch, rows, heads, width = queries.shape
    kv_heads, head_dim = value_pool.shape[1:]
    group = heads // kv_heads
    dtype = key_pool.dtype
    key_pages = key_pool.reshape(-1, page_size, kv_heads, key_pool.shape[2])
    value_pages = value_pool.reshape(-1, page_size, kv_heads, head_dim)
    grouped = queries.reshape(batch, rows, kv_heads, group, width)
    grouped = (grouped.astype(jnp.float32) * scale).astype(dtype)
    grouped = grouped.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, rows * group, width)

    query_index = starts[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]  # [B, T]
    last_seen = query_index if causal else jnp.broadcast_to(starts[:, None] + (rows - 1), query_index.shape)
    first_seen = jnp.zeros_like(query_index) if window is None else query_index - (window - 1)

    def visit(page: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = state  # [B, kv_heads, T*group], same, [B, kv_heads, T*group, D]
        column = jax.lax.rem(page, page_table.shape[1]) if ring else page
        ids = jax.lax.dynamic_index_in_dim(page_table, column, axis=1, keepdims=False)
        keys = jnp.take(key_pages, ids, axis=0, mode="clip").transpose(0, 2, 1, 3)  # [B, kv_heads, page, K]
        values = jnp.take(value_pages, ids, axis=0, mode="clip").transpose(0, 2, 1, 3)
        keys = jnp.concatenate([keys, values], axis=-1) if compact else keys  # [B, kv_heads, page, Q]
        scores = jax.lax.dot_general(
            grouped, keys, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
        )  # [B, kv_heads, T*group, page]
        key_index = (page * page_size + jnp.arange(page_size, dtype=jnp.int32))[None, None, :]
        seen = (key_index <= last_seen[:, :, None]) & (key_index >= first_seen[:, :, None])  # [B, T, page]
        seen = jnp.repeat(seen, group, axis=1)[:, None]  # [B, 1, T*group, page]
        scores = jnp.where(seen, scores, -jnp.inf)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=3))
        # A row that has seen nothing yet has a maximum of -inf; 0 in its place keeps exp() free of inf - inf.
        shift = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
        weights = jnp.exp(scores - shift[..., None])
        keep = jnp.exp(highest - shift)
        part = jax.lax.dot_general(
            weights.astype(dtype), values, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
        )
        return new_highest, total * keep + jnp.sum(weights, axis=3), mixed * keep[..., None] + part

    first_page = jnp.maximum(jnp.min(first_seen), 0) // page_size
    end_page = jnp.max(last_seen) // page_size + 1
    end_page = end_page if ring else jnp.minimum(end_page, page_table.shape[1])
    shape = (batch, kv_heads, rows * group)
    state = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, mixed = jax.lax.fori_loop(first_page, end_page, visit, state)
    mixed = mixed / jnp.where(total == 0, 1.0, total)[..., None]
    mixed = mixed.reshape(batch, kv_heads, rows, group, head_dim).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(batch, rows, heads, head_dim).astype(queries.dtype)
