"""What both halves of sparse attention share: which blocks of keys a block of query rows reads, and their means."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class SelectionRule:
    """Which blocks of keys count.

    block_size  tokens of a block of keys, and rows of a block of queries
    alpha       a block is read if its mass is this share of the largest block's
    sink        so many first blocks are always read
    window      so are the block of a query block's first row, those after it, and so many less one before it
    full        the last query blocks of a prompt read everything
    """

    block_size: int = 128
    alpha: float = 0.12
    sink: int = 2
    window: int = 4
    full: int = 2


class Selection(NamedTuple):
    """Per query block and head: the numbers of the blocks of keys to read, ascending, and how many they are.

    None begins behind the query block's last row.
    What stands behind the first `counts` indices means nothing.
    """

    indices: Int[Array, "B blocks H key_blocks"]
    counts: Int[Array, "B blocks H"]


def query_block_rows(rows: int, block_size: int) -> tuple[int, int]:
    """Rows of a query block, and how many blocks so many rows make; the last one may be shorter."""
    size = min(rows, block_size)
    return size, -(-rows // size)


def in_query_blocks(
    queries: Float[Array, "B T H Q"], size: int, blocks: int, padded: int
) -> Float[Array, "B blocks H padded Q"]:
    """Rows by query block and head, with zeros after the last row and after each block's `size` rows."""
    slots, rows, heads, width = queries.shape
    queries = jnp.pad(queries, ((0, 0), (0, blocks * size - rows), (0, 0), (0, 0)))
    queries = queries.reshape(slots, blocks, size, heads, width).transpose(0, 1, 3, 2, 4)
    return jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, padded - size), (0, 0)))


def in_rows(mixed: Float[Array, "B blocks H padded D"], size: int, rows: int) -> Float[Array, "B T H D"]:
    """The inverse of `in_query_blocks`."""
    slots, blocks, heads, _, width = mixed.shape
    mixed = mixed[:, :, :, :size].transpose(0, 1, 3, 2, 4)
    return mixed.reshape(slots, blocks * size, heads, width)[:, :rows]


def update_means(
    means: Float[Array, "B N kv_heads W"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    begins: Int[Array, " B"],
    ends: Int[Array, " B"],
    *,
    most: int,
    page_size: int,
    block_size: int,
) -> Float[Array, "B N kv_heads W"]:
    """The means with those of all blocks that hold token indices `begins..ends` (at most `most` tokens) made anew.

    A block that `ends` cuts is the mean of its tokens before that. In the compact form (W = K + D, block_attention)
    a mean is one of keys and values side by side.
    """
    if page_size % block_size:
        raise ValueError(f"pages of {page_size} tokens do not hold whole blocks of {block_size}")
    width, kv_heads = means.shape[3], means.shape[2]
    pools = [key_pool] if width == key_pool.shape[2] else [key_pool, value_pool]
    per_page = page_size // block_size
    touched = min(means.shape[1], (most + block_size - 2) // block_size + 1)
    number = begins[:, None] // block_size + jnp.arange(touched, dtype=jnp.int32)[None, :]  # [B, touched]
    page = jnp.take_along_axis(page_table, jnp.clip(number // per_page, 0, page_table.shape[1] - 1), axis=1)
    place = page * per_page + number % per_page
    token = number[:, :, None] * block_size + jnp.arange(block_size, dtype=jnp.int32)[None, None, :]
    inside = token < ends[:, None, None]  # [B, touched, block]

    def mean(pool: Array) -> Array:
        blocks = pool.reshape(-1, block_size, kv_heads, pool.shape[2])[place].astype(jnp.float32)
        total = jnp.sum(jnp.where(inside[..., None, None], blocks, 0.0), axis=2)
        return total / jnp.maximum(jnp.sum(inside, axis=2), 1).astype(jnp.float32)[..., None, None]

    new = jnp.concatenate([mean(pool) for pool in pools], axis=-1).astype(means.dtype)
    slot = jnp.arange(means.shape[0], dtype=jnp.int32)[:, None]
    # A number past the last block is dropped; so is one that holds nothing, or a later chunk's mean would be lost.
    target = jnp.where(inside[:, :, 0], number, means.shape[1])
    return means.at[slot, target].set(new, mode="drop")
