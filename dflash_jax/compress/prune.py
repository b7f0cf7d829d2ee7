"""From scores to the tokens that the target reads: whether to prune at all, how many to keep, at which positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.topk_pruning.api import select_tokens

Positions = Literal["original", "compact"]
Mode = Literal["auto", "on", "off"]

_LEAST_DROPPABLE = 64
"""Fewer tokens than this are not worth a look even if pruning is on."""
_LEAST_PROMPT = 1024
"""A shorter prompt is dense: its tokens matter and its prefill is quick. `auto` leaves it alone."""

_select = jax.jit(select_tokens, static_argnames=("chunk", "smooth"))


@dataclasses.dataclass(frozen=True)
class Gate:
    """When scoring is worth its time. `cost` is the scorer's work per token as a fraction of the target's."""

    mode: Mode
    cost: float

    def opens(self, *, new_tokens: int, droppable: int, keep_ratio: float) -> bool:
        """Whether to score a prompt's new tokens, of which so many may be dropped."""
        if self.mode == "off" or droppable < _LEAST_DROPPABLE or keep_ratio >= 1:
            return False
        if self.mode == "on":
            return True
        saved = (1 - keep_ratio) * droppable
        return new_tokens >= _LEAST_PROMPT and saved > 1.25 * self.cost * new_tokens


def budget(droppable: int, keep_ratio: float) -> int:
    """How many droppable tokens are kept at most."""
    return math.ceil(droppable * keep_ratio)


def select(scores: jax.Array, droppable: np.ndarray, *, first: int, keep_ratio: float) -> np.ndarray:
    """Which of the new tokens are kept, bool[len(droppable)].

    `scores` f32[S] counts from the start of what the scorer read; the new tokens begin at `first` there. What stands before
    them was decided earlier and is not touched.
    """
    end = first + len(droppable)
    mask = np.zeros(scores.shape[0], np.bool_)
    mask[first:end] = droppable
    kept = _select(
        scores, jnp.asarray(mask), jnp.int32(end), jnp.int32(budget(int(droppable.sum()), keep_ratio))
    )
    return np.asarray(kept)[first:end]


def rope_positions(kept: np.ndarray, positions: Positions) -> np.ndarray:
    """RoPE positions i32 of the kept tokens of a whole prompt: where they stood in it, or where they stand now."""
    original = np.flatnonzero(kept).astype(np.int32)
    return original if positions == "original" else np.arange(len(original), dtype=np.int32)
