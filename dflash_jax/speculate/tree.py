"""A tree of proposals from one parallel draft: the likeliest paths through a block, instead of the likeliest one.

A path is as likely as the product of its tokens, each given the one before it (DDTree, arXiv 2604.12989, section 3,
with the path selector's scores in place of independent rows). Where the target draws its tokens, scores have the noise
that it will use, so the tree holds what it is likely to draw.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from dflash_jax.models.decoder import Decoder
from dflash_jax.models.drafter import PathSelector
from dflash_jax.speculate.path import score_pairs
from dflash_jax.speculate.sampling import SamplingParameters
from pallas_kernels.draft_tree.api import Tree, draft_tree

_CONFIDENCE = 0.5
"""What scores are multiplied with: a drafter is surer than it is right. Measured: docs/training.md, "Trees"."""


def choose_tree(
    target: Decoder,
    selector: PathSelector | None,
    hidden: Float[Array, "slots levels dim"],
    anchor: Int[Array, " slots"],
    sampling: SamplingParameters,
    number: Int[Array, " slots"],
    *,
    rows: int,
) -> Tree:
    """The likeliest `rows - 1` nodes below the anchor; arguments are those of `choose_path`."""
    candidates, scores = score_pairs(target, selector, hidden, anchor, sampling, number)
    return draft_tree(anchor, candidates, jax.nn.log_softmax(_CONFIDENCE * scores, axis=-1), rows=rows)
