"""Choosing and listing the prompt tokens that PFlash keeps: the public names."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.topk_pruning import reference


def select_tokens(
    scores: Float[Array, " S"],
    droppable: Bool[Array, " S"],
    length: Int[Array, ""],
    budget: Int[Array, ""],
    *,
    chunk: int = 32,
    smooth: int = 13,
) -> Bool[Array, " S"]:
    """Which of the first `length` tokens to keep.

    Every token that is not droppable stays. Of the droppable ones, whole chunks stay (token indices `chunk * c` up to
    `chunk * (c + 1)`, of which only the droppable tokens count), best first by the mean of their average-pooled score,
    until the next chunk would bring the count above `budget`; where not even the best one fits, its best tokens stay.
    Equal chunks go in order. A NaN among the scores keeps everything: a broken scorer must not lose text. Pooling width
    and chunk length are those of Speculative Prefill (arXiv 2502.02789).
    """
    return reference.select_tokens(scores, droppable, length, budget, chunk=chunk, smooth=smooth)


def compact(keep: Bool[Array, " S"]) -> tuple[Int[Array, " S"], Int[Array, ""]]:
    """The indices of kept tokens in order, then zeros; and how many there are."""
    return reference.compact(keep)
