"""Norms, RoPE and the writing of pages in plain jnp."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged import pool_rows
from pallas_kernels.residual_norm.reference import rms_norm, sum_of

KvPool = tuple[Float[Array, "_tokens _kv_heads _head_dim"], Float[Array, "_tokens _kv_heads _head_dim"]]
"""K and V of one layer: `pages * page_size` rows each, shared by all sequences through page tables.

Layers differ in pages and heads, and K may be narrower than V (the underscores tell jaxtyping so).
"""
Tables = tuple[Float[Array, "slots rows 1 half"], Float[Array, "slots rows 1 half"]]
"""cos and sin of the angle of every pair at every position."""


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """What the columns of a projection are: `heads` of queries, then `kv_heads` of keys, then as many of values.

    values_are_keys   there are no columns of values: those of the keys are both
    key_width         numbers of a key that are stored; fewer than `head_dim` in the compact form
    column            where the first one stands, in a matrix that has more beside them
    """

    heads: int
    kv_heads: int
    head_dim: int
    key_width: int
    values_are_keys: bool = False
    column: int = 0

    @property
    def compact(self) -> bool:
        """Whether keys are the numbers that RoPE turns, and otherwise follow from the values."""
        return self.key_width < self.head_dim

    @property
    def projected(self) -> int:
        """Heads that have columns."""
        return self.heads + self.kv_heads * (1 if self.values_are_keys else 2)


@dataclasses.dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each head: scales of queries' and keys' (None: no norm), and whether values have one without scale."""

    queries: Float[Array, " head_dim"] | None
    keys: Float[Array, " head_dim"] | None
    values: bool
    eps: float


Heads = Float[Array, "slots rows _heads _head_dim"]


def attention_rows(
    parts: Float[Array, "parts slots rows width"],
    pool: KvPool | None,
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    tables: Tables,
    *,
    layout: HeadLayout,
    norms: HeadNorms,
    dtype: DTypeLike,
    page_size: int,
    ring: bool,
) -> tuple[Heads, KvPool | None]:
    """See `api.attention_rows`."""
    queries, keys, values = normed_heads(parts, layout=layout, norms=norms, dtype=dtype)
    queries = rotate(queries, tables)
    if pool is None:
        return queries, None
    keys = rotate(keys, tables)
    if layout.compact:
        queries, keys = _compact(queries, keys, layout.key_width, norms.keys)
    return queries, write_rows(pool, keys, values, page_table, starts, page_size, ring=ring)


def normed_heads(
    parts: Float[Array, "parts slots rows width"], *, layout: HeadLayout, norms: HeadNorms, dtype: DTypeLike
) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values with their norms, before RoPE."""
    first, last = layout.column, layout.column + layout.projected * layout.head_dim
    heads = sum_of(parts[..., first:last], jnp.dtype(dtype)).reshape(*parts.shape[1:3], -1, layout.head_dim)
    queries, kv = heads[:, :, : layout.heads], heads[:, :, layout.heads :]
    keys, values = (kv, kv) if layout.values_are_keys else jnp.split(kv, 2, axis=2)
    queries = queries if norms.queries is None else rms_norm(queries, norms.queries, eps=norms.eps)
    keys = keys if norms.keys is None else rms_norm(keys, norms.keys, eps=norms.eps)
    return queries, keys, rms_norm(values, None, eps=norms.eps) if norms.values else values


def _compact(
    queries: Heads, keys: Heads, key_width: int, key_scale: Float[Array, " head_dim"] | None
) -> tuple[Heads, Heads]:
    """The compact form: keys of the dims that RoPE turns; in the others K is V times the weight of K's norm.

    That weight goes to the queries, whose last `head_dim` numbers meet the values.
    """
    assert key_scale is not None
    weight = jnp.where(standing(key_width, queries.shape[-1]), key_scale, 0.0)
    meeting_values = (queries.astype(jnp.float32) * weight[None, None, None, :]).astype(queries.dtype)
    return jnp.concatenate([turning(queries, key_width), meeting_values], axis=-1), turning(keys, key_width)


def rotate(x: Float[Array, "slots rows heads head_dim"], tables: Tables) -> Float[Array, "slots rows heads head_dim"]:
    """Half-split RoPE: pair (d, d + head_dim / 2) turns by its angle."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def turning(x: Float[Array, "... head_dim"], width: int) -> Float[Array, "... width"]:
    """The dims of each head that RoPE turns, where it turns the first `width / 2` pairs only."""
    half = x.shape[-1] // 2
    return jnp.concatenate([x[..., : width // 2], x[..., half : half + width // 2]], axis=-1)


def standing(width: int, head_dim: int) -> Bool[np.ndarray, " head_dim"]:
    """Which dims of a head are not among those."""
    return np.arange(head_dim) % (head_dim // 2) >= width // 2


def write_rows(
    pool: KvPool,
    keys: Float[Array, "slots rows kv_heads key_width"],
    values: Float[Array, "slots rows kv_heads head_dim"],
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    page_size: int,
    *,
    ring: bool = False,
) -> KvPool:
    """Puts the rows at token indices `starts..` of each slot.

    Rows past a slot's last page land in page 0, which nobody reads; a ring of pages goes round instead.
    """
    slots, rows = keys.shape[:2]
    index = starts[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]  # [slots, rows]
    target = pool_rows(index, page_table, page_size, ring=ring).reshape(slots * rows)

    # XLA turns a scatter of one row into an update that copies the whole pool (CPU, jax 0.10); the same row twice stays
    # in place.
    twice = 2 if slots * rows == 1 else 1
    target = jnp.tile(target, twice)

    def put(old: Array, new: Array) -> Array:
        flat = jnp.tile(new.reshape(slots * rows, *new.shape[2:]).astype(old.dtype), (twice, 1, 1))
        return old.at[target].set(flat, mode="promise_in_bounds")

    return put(pool[0], keys), put(pool[1], values)
