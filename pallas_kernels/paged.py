"""What operations over paged KV share: where a token is, and what their kernels can take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

_LEAST = 16


def why_not(page_size: int, *head_dims: int) -> str | None:
    """What is wrong about these sizes, as the end of a sentence; None when the kernels take them."""
    for name, size in (("page_size", page_size), *(("head_dim", size) for size in head_dims)):
        if size & (size - 1) or size < _LEAST:
            return f"takes powers of two from {_LEAST} on, got {name} {size}"
    return None


def pool_rows(
    index: Int[Array, "slots rows"], page_table: Int[Array, "slots pages"], page_size: int, *, ring: bool
) -> Int[Array, "slots rows"]:
    """The pool's rows for token indices.

    Those past a slot's last page are in page 0, which nobody reads; a ring of pages goes round instead.
    """
    page_number = index // page_size
    if ring:
        page_number = page_number % page_table.shape[1]
    inside = page_number < page_table.shape[1]
    page = jnp.take_along_axis(page_table, jnp.where(inside, page_number, 0), axis=1)
    return jnp.where(inside, page * page_size + index % page_size, index % page_size)


def pool_row(table_ref: Any, slot: Array, token: Array, page_size: int, ring: bool) -> Array:
    """The same inside a kernel, for a token index of a slot, or for arrays of both."""
    number, pages = jax.lax.div(token, page_size), table_ref.shape[1]
    number = jax.lax.rem(number, pages) if ring else number
    page = jnp.where(number < pages, table_ref[slot, jnp.minimum(number, pages - 1)], 0)
    return page * page_size + jax.lax.rem(token, page_size)
