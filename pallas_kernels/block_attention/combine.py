"""Putting the splits of block attention together, as one small kernel.

One program per row and head reads what all splits found for it, weighs them by their highest scores, and writes the row
where the caller wants it. XLA does the same in three passes and a transpose; in a step of a small model these cost more
than the attention itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

MOST_SPLITS = 64
"""Splits that are worth putting together."""


def splits_for(most: int, key_blocks: int) -> int:
    """A power of two; it follows from shapes alone, so that the same row is always split alike."""
    wanted = min(MOST_SPLITS, max(1, most), max(1, key_blocks // 2))
    return 1 << (wanted.bit_length() - 1)


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
    splits, batch, kv_heads, _, head_dim = mixed.shape

    def of_row(*last: int) -> pl.BlockSpec:
        def place(slot: Array, head: Array, line: Array) -> tuple[Any, ...]:
            at = line if entry is None else entry(line // group, line % group)
            return 0, slot, head, at, *[0] * len(last)

        return pl.BlockSpec((splits, None, None, None, *last), place)

    return pl.pallas_call(
        _kernel,
        grid=(batch, kv_heads, rows * group),
        in_specs=[of_row(head_dim), of_row(), of_row()],
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


def _kernel(mixed_ref, highest_ref, total_ref, out_ref) -> None:
    highest, total, mixed = highest_ref[...], total_ref[...], mixed_ref[...]  # [splits], [splits], [splits, D]
    share = jnp.exp(highest - jnp.max(highest))
    total = jnp.sum(total * share)
    mixed = jnp.sum(mixed * share[:, None], axis=0)
    out_ref[...] = (mixed / jnp.where(total == 0.0, 1.0, total)).astype(out_ref.dtype)
