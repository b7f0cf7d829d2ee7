"""Moving rows to the front of their block, as one Pallas Triton kernel: a program per slot, pool and head.

A kernel per pool would cost a small model's step more than the tree brings: 60 launches for 30 layers. Every program
reads all of its rows, waits for its own threads, then writes; rows that are where they belong are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

from pallas_kernels.move_rows.reference import Pool
from pallas_kernels.paged import pool_row, why_not


def move_rows(
    pools: Sequence[Pool],
    path: Int[Array, "slots rows"],
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    *,
    page_size: int,
    ring: bool,
    interpret: bool = False,
) -> tuple[Pool, ...]:
    """See `api.move_rows`. Raises NotImplementedError for sizes that are not powers of two."""
    if reason := why_not(page_size, *(pool.shape[2] for pool in pools)):
        raise NotImplementedError(f"move_rows on Triton {reason}")
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    others = (path, page_table, starts)
    moved = pl.pallas_call(
        functools.partial(_kernel, page_size=page_size, ring=ring, waits=not interpret),
        grid=(len(path), len(pools), max(pool.shape[1] for pool in pools)),
        in_specs=[whole] * (len(others) + len(pools)),
        out_specs=[whole] * len(pools),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
        input_output_aliases={len(others) + index: index for index in range(len(pools))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="move_rows",
    )(*others, *pools)
    return tuple(moved)


def _kernel(path_ref, table_ref, starts_ref, *refs, page_size: int, ring: bool, waits: bool) -> None:
    pool_refs = refs[len(refs) // 2 :]
    slot, number, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows = path_ref.shape[1]
    row = jnp.arange(pl.next_power_of_2(rows), dtype=jnp.int32)
    slots = jnp.full_like(row, slot)
    origin = plt.load(path_ref.at[slots, jnp.minimum(row, rows - 1)])
    moves = (row < rows) & (origin != row)
    source, target = (pool_row(table_ref, slots, starts_ref[slot] + each, page_size, ring) for each in (origin, row))

    for index, ref in enumerate(pool_refs):

        @pl.when((number == index) & (head < ref.shape[1]))
        def _(ref=ref) -> None:
            shape = (len(row), ref.shape[2])
            heads = jnp.full(shape, head)
            columns = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
            mask = jnp.broadcast_to(moves[:, None], shape)

            def at(pool_row):
                return ref.at[jnp.broadcast_to(pool_row[:, None], shape), heads, columns]

            values = plt.load(at(source), mask=mask, other=0)
            if waits:
                plt.debug_barrier()
            plt.store(at(target), values, mask=mask)
