"""Sparse attention in plain jnp: all block scores at once, then one selected block of every query block per turn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_attention.selection import (
    Selection,
    SelectionRule,
    in_query_blocks,
    in_rows,
    query_block_rows,
)


def select_blocks(
    queries: Float[Array, "B T H Q"],
    means: Float[Array, "B N kv_heads Q"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    rule: SelectionRule,
) -> Selection:
    """See `api.select_blocks`."""
    rows, heads = queries.shape[1:3]
    size, blocks = query_block_rows(rows, rule.block_size)
    grouped = in_query_blocks(queries.astype(means.dtype), size, blocks, size)
    keys = jnp.repeat(means, heads // means.shape[2], axis=2).transpose(0, 2, 3, 1)  # [B, H, Q, N]
    keys = jnp.broadcast_to(keys[:, None], (keys.shape[0], blocks, *keys.shape[1:]))
    scores = scale * jax.lax.dot_general(
        grouped, keys, (((4,), (3,)), ((0, 1, 2), (0, 1, 2))), preferred_element_type=jnp.float32
    )  # [B, blocks, H, size, N]

    first = starts[:, None] + size * jnp.arange(blocks, dtype=jnp.int32)[None, :]  # [B, blocks]
    last = jnp.minimum(jnp.minimum(first + size, starts[:, None] + rows), lengths[:, None]) - 1
    token = first[:, :, None] + jnp.arange(size, dtype=jnp.int32)[None, None, :]  # [B, blocks, size]
    number = jnp.arange(means.shape[1], dtype=jnp.int32)[None, None, :]  # [1, 1, N]
    real = token <= last[:, :, None]
    seen = real[..., None] & (number[:, :, None] * rule.block_size <= token[..., None])  # [B, blocks, size, N]

    seen = seen[:, :, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jnp.max(scores, axis=(3, 4), keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    mass = jnp.sum(jnp.exp(scores - peak), axis=3)  # [B, blocks, H, N]
    heavy = mass >= rule.alpha * jnp.max(mass, axis=3, keepdims=True)

    near = number > first[:, :, None] // rule.block_size - rule.window
    whole = first >= lengths[:, None] - rule.full * rule.block_size
    always = (number < rule.sink) | near | whole[:, :, None]
    visible = (number * rule.block_size <= last[:, :, None]) & (first < lengths[:, None])[:, :, None]
    kept = (heavy | always[:, :, None]) & visible[:, :, None]
    indices = jnp.argsort(~kept, axis=3, stable=True).astype(jnp.int32)
    return Selection(indices, jnp.sum(kept, axis=3, dtype=jnp.int32))


def attend_blocks(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    selection: Selection,
    *,
    page_size: int,
    scale: float,
    block_size: int,
    compact: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.attend_blocks`."""
    slots, rows, heads, _ = queries.shape
    kv_heads, head_dim = value_pool.shape[1:]
    size, blocks = query_block_rows(rows, block_size)
    dtype = key_pool.dtype
    grouped = in_query_blocks((queries.astype(jnp.float32) * scale).astype(dtype), size, blocks, size)
    first = starts[:, None] + size * jnp.arange(blocks, dtype=jnp.int32)[None, :]
    token = first[:, :, None] + jnp.arange(size, dtype=jnp.int32)[None, None, :]  # [B, blocks, size]
    kv_head = (jnp.arange(heads, dtype=jnp.int32) // (heads // kv_heads))[None, None, :]
    slot = jnp.arange(slots, dtype=jnp.int32)[:, None, None]
    per_page = page_size // block_size
    key_blocks, value_blocks = (
        pool.reshape(-1, block_size, kv_heads, pool.shape[2]) for pool in (key_pool, value_pool)
    )
    batch = ((0, 1, 2), (0, 1, 2))

    def visit(turn: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = state  # [B, blocks, H, size], same, [B, blocks, H, size, D]
        number = jax.lax.dynamic_index_in_dim(selection.indices, turn, axis=3, keepdims=False)  # [B, blocks, H]
        live = turn < selection.counts
        number = jnp.where(live, number, 0)
        place = page_table[slot, number // per_page] * per_page + number % per_page
        keys, values = key_blocks[place, :, kv_head], value_blocks[place, :, kv_head]  # [B, blocks, H, block, K]
        keys = jnp.concatenate([keys, values], axis=-1) if compact else keys
        scores = jax.lax.dot_general(grouped, keys, (((4,), (4,)), batch), preferred_element_type=jnp.float32)
        key_index = number[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)[None, None, None, :]
        seen = live[..., None, None] & (key_index[:, :, :, None, :] <= token[:, :, None, :, None])
        scores = jnp.where(seen, scores, -jnp.inf)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=4))
        shift = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
        weights = jnp.exp(scores - shift[..., None])
        keep = jnp.exp(highest - shift)
        part = jax.lax.dot_general(
            weights.astype(dtype), values, (((4,), (3,)), batch), preferred_element_type=jnp.float32
        )
        return new_highest, total * keep + jnp.sum(weights, axis=4), mixed * keep[..., None] + part

    shape = (slots, blocks, heads, size)
    state = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, mixed = jax.lax.fori_loop(0, jnp.max(selection.counts), visit, state)
    mixed = mixed / jnp.where(total == 0, 1.0, total)[..., None]
    return in_rows(mixed, size, rows).astype(queries.dtype)
