"""The tree of proposals as one Pallas Triton kernel: a program per slot, which is one warp.

What can be the next node stands in registers, a row of children for each row of the tree. A turn finds the best of
them, looks its row's depth and ancestors up by a sum in which all others are zero, and loads the scores of its own
children: a few dozen instructions, where XLA would launch some kernels per node.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.draft_tree.reference import Tree


def takes(scores: Float[Array, "slots levels K K"]) -> bool:
    """Whether the number of candidates is a power of two."""
    return scores.shape[-1] == pl.next_power_of_2(scores.shape[-1])


@functools.partial(jax.jit, static_argnames=("rows", "interpret"))
def draft_tree(
    anchor: Int[Array, " slots"],
    candidates: Int[Array, "slots levels K"],
    scores: Float[Array, "slots levels K K"],
    *,
    rows: int,
    interpret: bool = False,
) -> Tree:
    """See `api.draft_tree`. Raises NotImplementedError for other numbers of candidates than powers of two."""
    slots, levels, count = candidates.shape
    if not takes(scores):
        raise NotImplementedError(f"draft_tree on Triton takes a power of two of candidates, got {count}")
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    tokens, parents, depths, sees = pl.pallas_call(
        functools.partial(_kernel, rows=rows, levels=levels, count=count),
        grid=(slots,),
        in_specs=[whole] * 3,
        out_specs=[whole] * 4,
        out_shape=[jax.ShapeDtypeStruct((slots, rows), dtype) for dtype in (*[jnp.int32] * 3, jnp.uint32)],
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="draft_tree",
    )(anchor, candidates, scores)
    return Tree(tokens, parents, Ancestry(depths, sees))


def _kernel(
    anchor_ref, candidates_ref, scores_ref, tokens_ref, parents_ref, depths_ref, sees_ref, *, rows, levels, count
) -> None:
    slot = pl.program_id(0)
    row_of, children = jnp.arange(pl.next_power_of_2(rows), dtype=jnp.int32), pl.ds(0, count)
    number = row_of[:, None] * count + jnp.arange(count, dtype=jnp.int32)[None, :]

    def look_up(values, row):
        return jnp.sum(jnp.where(row_of == row, values, jnp.zeros_like(values)))

    def take(row, state):
        tokens, parents, depths, sees, open_nodes = state
        best = jnp.max(open_nodes)
        place = jnp.min(jnp.where(open_nodes == best, number, number.size))
        parent, choice = jax.lax.div(place, count), jax.lax.rem(place, count)
        level, above = look_up(depths, parent), look_up(sees, parent)
        token = jnp.where(best > -jnp.inf, plt.load(candidates_ref.at[slot, level, choice]), -1)
        below = plt.load(scores_ref.at[slot, jnp.minimum(level + 1, levels - 1), choice, children])
        below = jnp.where(level + 1 < levels, best + below, -jnp.inf)
        own = jax.lax.shift_left(jnp.int32(1), row)
        here = row_of == row
        return (
            jnp.where(here, token, tokens),
            jnp.where(here, parent, parents),
            jnp.where(here, level + 1, depths),
            jnp.where(here, above | own, sees),
            jnp.where(here[:, None], below[None, :], jnp.where(number == place, -jnp.inf, open_nodes)),
        )

    zeros = jnp.zeros_like(row_of)
    first = plt.load(scores_ref.at[slot, jnp.int32(0), jnp.int32(0), children])
    start = (
        jnp.where(row_of == 0, anchor_ref[slot], zeros),
        zeros,
        zeros,
        jnp.where(row_of == 0, 1, zeros),
        jnp.where(number < count, first[None, :], -jnp.inf),
    )
    *found, _ = jax.lax.fori_loop(1, rows, take, start)
    for ref, values in zip((tokens_ref, parents_ref, depths_ref, sees_ref), found, strict=True):
        where = ref.at[jnp.full_like(row_of, slot), row_of]
        plt.store(where, values.astype(ref.dtype), mask=row_of < rows)
