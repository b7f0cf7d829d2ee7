"""Attention of a few query rows per slot over paged KV, page by page with an online softmax, in plain jnp.

Pages are visited at fixed absolute positions and a page that a row does not see leaves that row's sums untouched, bit
for bit. So a row's result depends neither on how far its neighbours reach nor on what they hold. A row of a tree reads
its ancestors in the places of a chain, so it has the chain's bits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.paged import pool_rows

Sums = tuple[Array, Array, Array]
"""Of each line: the largest score, the sum of weights relative to it, and values mixed by these weights."""


def block_attention(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    tree: Ancestry | None = None,
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

    row_index = starts[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]  # [B, T]
    query_index = row_index if tree is None else starts[:, None] + tree.depths
    last_seen = query_index if causal else jnp.broadcast_to(starts[:, None] + (rows - 1), query_index.shape)
    first_seen = jnp.zeros_like(query_index) if window is None else query_index - (window - 1)
    end_page = jnp.max(last_seen) // page_size + 1
    end_page = end_page if ring else jnp.minimum(end_page, page_table.shape[1])

    def add_page(page: Array, state: Sums, scores: Array, mix: Callable[[Array], Array]) -> Sums:
        highest, total, mixed = state
        key_index = (page * page_size + jnp.arange(page_size, dtype=jnp.int32))[None, None, :]
        seen = (key_index <= last_seen[:, :, None]) & (key_index >= first_seen[:, :, None])  # [B, T, page]
        seen = jnp.repeat(seen, group, axis=1)[:, None]  # [B, 1, T*group, page]
        scores = jnp.where(seen, scores, -jnp.inf)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=3))
        # A row that has seen nothing yet has a maximum of -inf; 0 in its place keeps exp() free of inf - inf.
        shift = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
        weights = jnp.exp(scores - shift[..., None])
        keep = jnp.exp(highest - shift)
        part = mix(weights.astype(dtype))
        return new_highest, total * keep + jnp.sum(weights, axis=3), mixed * keep[..., None] + part

    def visit(page: Array, state: Sums) -> Sums:
        column = jax.lax.rem(page, page_table.shape[1]) if ring else page
        ids = jax.lax.dynamic_index_in_dim(page_table, column, axis=1, keepdims=False)
        keys = jnp.take(key_pages, ids, axis=0, mode="clip").transpose(0, 2, 1, 3)  # [B, kv_heads, page, K]
        values = jnp.take(value_pages, ids, axis=0, mode="clip").transpose(0, 2, 1, 3)
        keys = jnp.concatenate([keys, values], axis=-1) if compact else keys  # [B, kv_heads, page, Q]
        return add_page(page, state, _dot(grouped, keys, 3), lambda weights: _dot(weights, values, 2))

    def visit_by_row(page: Array, state: Sums) -> Sums:
        """Every row of a tree has the keys of its own ancestors where a chain of them would have its rows."""
        assert tree is not None
        token = page * page_size + jnp.arange(page_size, dtype=jnp.int32)
        place = pool_rows(tree.stored(starts, token[None]).reshape(batch, -1), page_table, page_size, ring=ring)
        place = place.reshape(batch, rows, page_size)
        keys, values = (pool[place].transpose(0, 3, 1, 2, 4) for pool in (key_pool, value_pool))
        keys = jnp.concatenate([keys, values], axis=-1) if compact else keys  # [B, kv_heads, T, page, Q]

        def by_row(lines: Array, others: Array, axis: int) -> Array:
            lines = lines.reshape(batch, kv_heads, rows, group, -1)
            lines = jnp.concatenate([lines, lines], axis=3)  # a group may be one line, as above
            return _dot(lines, others, axis)[:, :, :, :group].reshape(batch, kv_heads, rows * group, -1)

        return add_page(page, state, by_row(grouped, keys, 4), lambda weights: by_row(weights, values, 3))

    shape = (batch, kv_heads, rows * group)
    state = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    first_page = jnp.maximum(jnp.min(first_seen), 0) // page_size
    if tree is not None:
        tree_page = jnp.maximum(first_page, jnp.min(starts) // page_size)
        state = jax.lax.fori_loop(first_page, tree_page, visit, state)
        _, total, mixed = jax.lax.fori_loop(tree_page, end_page, visit_by_row, state)
    else:
        _, total, mixed = jax.lax.fori_loop(first_page, end_page, visit, state)
    mixed = mixed / jnp.where(total == 0, 1.0, total)[..., None]
    mixed = mixed.reshape(batch, kv_heads, rows, group, head_dim).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(batch, rows, heads, head_dim).astype(queries.dtype)


def _dot(lines: Array, others: Array, axis: int) -> Array:
    """[..., lines, n] times what has n along an axis of its last two: over all axes before, in f32."""
    before = tuple(range(lines.ndim - 2))
    contracted = ((lines.ndim - 1,), (axis,))
    return jax.lax.dot_general(lines, others, (contracted, (before, before)), preferred_element_type=jnp.float32)
