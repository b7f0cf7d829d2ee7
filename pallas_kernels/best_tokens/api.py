"""The few largest of many logits: the public name."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.best_tokens import reference, triton
from pallas_kernels.implementations import choose

MOST = 64
"""Tokens that are found one after the other."""


def best_tokens(
    logits: Float[Array, "rows vocab"], *, count: int, implementation: str | None = None
) -> Int[Array, "rows count"]:
    """Ids of the `count` largest logits of every row, largest first; of equal ones the smallest id first.

    At least so many logits of a row are finite.
    """
    if not 0 < count <= logits.shape[-1]:
        raise ValueError(f"count is {count}; a row has {logits.shape[-1]} logits: take between one and all of them")
    if count > MOST:
        raise NotImplementedError(f"best_tokens finds {MOST} tokens at most, got count {count}: sort the logits")
    chosen = triton if choose("best_tokens", implementation, triton_fits=True) == "triton" else reference
    return chosen.best_tokens(logits, count=count)
