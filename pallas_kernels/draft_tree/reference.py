"""A tree of proposals in plain jnp: the best open node, again and again."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.ancestry import Ancestry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """Rows to verify: the anchor, then nodes, likeliest first; so a parent comes before its children.

    Rows that hold no node, because nothing was left that can be, have token -1; their parent is the anchor.
    """

    tokens: Int[Array, "slots rows"]
    parents: Int[Array, "slots rows"]
    """The parent's row, the anchor's own for the anchor."""
    ancestry: Ancestry


def draft_tree(
    anchor: Int[Array, " slots"],
    candidates: Int[Array, "slots levels K"],
    scores: Float[Array, "slots levels K K"],
    *,
    rows: int,
) -> Tree:
    """See `api.draft_tree`."""
    return jax.vmap(functools.partial(_grow, rows=rows))(anchor, candidates, scores)


def _grow(
    anchor: Int[Array, ""], candidates: Int[Array, "levels K"], scores: Float[Array, "levels K K"], *, rows: int
) -> Tree:
    levels, count = candidates.shape
    zeros = jnp.zeros(rows, jnp.int32)
    tree = Tree(zeros.at[0].set(anchor), zeros, Ancestry(zeros, zeros.astype(jnp.uint32).at[0].set(1)))
    # Entry [r, k]: the log-probability of the path to child k of row r, if that can be the next node.
    open_nodes = jnp.full((rows, count), -jnp.inf).at[0].set(scores[0, 0])

    def take(row: Array, state: tuple[Tree, Array]) -> tuple[Tree, Array]:
        tree, open_nodes = state
        parent, choice = jnp.divmod(jnp.argmax(open_nodes).astype(jnp.int32), count)
        best = open_nodes[parent, choice]
        level = tree.ancestry.depths[parent]
        below = jnp.where(level + 1 < levels, scores[jnp.minimum(level + 1, levels - 1), choice], -jnp.inf)
        open_nodes = open_nodes.at[parent, choice].set(-jnp.inf).at[row].set(best + below)
        token = jnp.where(best > -jnp.inf, candidates[level, choice], -1)
        sees = tree.ancestry.sees[parent] | jnp.left_shift(jnp.uint32(1), row.astype(jnp.uint32))
        ancestry = Ancestry(tree.ancestry.depths.at[row].set(level + 1), tree.ancestry.sees.at[row].set(sees))
        return Tree(tree.tokens.at[row].set(token), tree.parents.at[row].set(parent), ancestry), open_nodes

    return jax.lax.fori_loop(1, rows, take, (tree, open_nodes))[0]
