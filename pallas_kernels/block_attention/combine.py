"""Putting the splits of block attention together, as one small kernel.

One program per row and head reads what all splits found for it, weighs them by their highest scores, and writes the row
where the caller wants it. XLA does the same in three passes and a transpose; in a step of a small model these cost more
than the attention itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.online_softmax import LOWEST

MOST_SPLITS = 64
"""Splits that are worth putting together."""


def splits_for(most: int, key_blocks: int) -> int:
    """How many are worth it; it follows from shapes alone, so that the same row is always split alike."""
    return min(MOST_SPLITS, max(1, most), max(1, key_blocks // 2))


def combine(
    mixed: Float[Array, "splits B kv_heads stacked D"],
    highest: Float[Array, "splits B kv_heads stacked"],
    total: Float[Array, "splits B kv_heads stacked"],
    *,
    rows: int,
    group: int,
    dtype: DTypeLike,
    entry: Callable[[Array, Array], Array] | None = None,
    interpret: bool = False,
) -> Float[Array, "B rows heads D"]:
    """Rows of all heads from sums over splits: `mixed` and `total` are relative to `exp(highest)`.

    Of the stacked axis, row r of head g (of the group that shares a KV head) is entry `r * group + g`, or
    `entry(r, g)`; all else is padding. A row with a total of zero gives zeros.
    """
    _, batch, kv_heads, _, head_dim = mixed.shape
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    return pl.pallas_call(
        functools.partial(_kernel, group=group, entry=entry),
        grid=(batch, kv_heads, rows * group),
        in_specs=[whole] * 3,
        out_specs=pl.BlockSpec(
            (None, None, None, head_dim),
            functools.partial(_place, group=group),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, rows, kv_heads * group, head_dim), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="combine_splits",
    )(mixed, highest, total)


def _place(slot: Array, head: Array, row: Array, *, group: int) -> tuple[Array, Array, Array, int]:
    return slot, row // group, head * group + row % group, 0


def _kernel(
    mixed_ref, highest_ref, total_ref, out_ref, *, group: int, entry: Callable[[Array, Array], Array] | None
) -> None:
    splits, head_dim = mixed_ref.shape[0], mixed_ref.shape[4]
    slot, head, line = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if entry is not None:
        line = entry(jax.lax.div(line, group), jax.lax.rem(line, group))
    count = pl.next_power_of_2(splits)
    split = jnp.arange(count, dtype=jnp.int32)
    at = (split, *(jnp.full_like(split, each) for each in (slot, head, line)))
    there = split < splits
    highest = plt.load(highest_ref.at[at], mask=there, other=LOWEST)
    share = jnp.exp(highest - jnp.max(highest))
    total = jnp.sum(plt.load(total_ref.at[at], mask=there, other=0.0) * share)
    shape = (count, head_dim)
    at = tuple(jnp.broadcast_to(each[:, None], shape) for each in at)
    column = jnp.broadcast_to(jnp.arange(head_dim, dtype=jnp.int32)[None, :], shape)
    mask = jnp.broadcast_to(there[:, None], shape)
    mixed = jnp.sum(plt.load(mixed_ref.at[(*at, column)], mask=mask, other=0.0) * share[:, None], axis=0)
    out_ref[...] = (mixed / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype)
