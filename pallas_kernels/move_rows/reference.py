"""Moving rows to the front of their block in plain jnp: all are read, then all are written."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged import pool_rows

Pool = Float[Array, "_tokens _kv_heads _width"]


def move_rows(
    pools: Sequence[Pool],
    path: Int[Array, "slots rows"],
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    *,
    page_size: int,
    ring: bool,
) -> tuple[Pool, ...]:
    """See `api.move_rows`."""
    in_order = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :]
    source, target = (
        pool_rows(starts[:, None] + index, page_table, page_size, ring=ring).reshape(-1) for index in (path, in_order)
    )
    return tuple(pool.at[target].set(pool[source], mode="promise_in_bounds") for pool in pools)
