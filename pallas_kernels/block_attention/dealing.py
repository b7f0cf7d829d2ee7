"""Blocks of keys, dealt out in turn: of so many splits, each takes every so many of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def first_from(block: Array, split: Array, splits: int) -> Array:
    """The split's first block from this one on."""
    return block + jax.lax.rem(split + splits - jax.lax.rem(block, splits), splits)


def visits_before(end: Array, first: Array, splits: int | Array) -> Array:
    """How many blocks before `end` a split visits that begins with block `first` and takes every so many of them."""
    return jax.lax.div(jnp.maximum(end - first, 0) + (splits - 1), splits)
