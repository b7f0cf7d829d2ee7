"""A tree of proposals from one draft: the public name."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.ancestry import MOST_ROWS
from pallas_kernels.draft_tree import reference, triton
from pallas_kernels.draft_tree.reference import Tree
from pallas_kernels.implementations import choose

__all__ = ["Tree", "draft_tree"]


def draft_tree(
    anchor: Int[Array, " slots"],
    candidates: Int[Array, "slots levels K"],
    scores: Float[Array, "slots levels K K"],
    *,
    rows: int,
    implementation: str | None = None,
) -> Tree:
    """The anchor and the `rows - 1` likeliest paths that start there (DDTree, arXiv 2604.12989, section 3).

    `candidates` are the tokens that may stand at each level; entry [a, b] of a level's `scores` is the log-probability
    of its candidate b after candidate a of the level before, of which the first level has the anchor alone (a = 0). A
    path is as likely as the sum of its scores, none of which is positive: a node's children are never likelier than
    itself, so the best open node is always the next one. Of equal ones the child of the earlier row is taken, then
    the earlier candidate. A node at the last level has no children, and a score of -inf is no node:
    candidates of a level that are the same token need it, all but one, or a parent has two children of one token.
    """
    if not 1 < rows <= MOST_ROWS:
        raise ValueError(f"rows is {rows}: a tree has between 2 and {MOST_ROWS}, the anchor's among them")
    implementation = choose("draft_tree", implementation, triton_fits=triton.takes(scores))
    chosen = triton if implementation == "triton" else reference
    return chosen.draft_tree(anchor, candidates, scores, rows=rows)
