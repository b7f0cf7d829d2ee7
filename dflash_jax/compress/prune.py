"""From scores to the tokens that the target reads: whether to prune at all, how many to keep, at which positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.topk_pruning.api import select_tokens

Positions = Literal["original", "compact"]
"""Where RoPE sees the kept tokens: where they stood in the prompt, or end to end.

docs/pflash.md has what each finds again.
"""
Mode = Literal["auto", "on", "off"]

_SMOOTH = 13
"""Tokens over which scores are averaged: a name or a number is worth little without its neighbours."""

_LEAST_DROPPABLE = 64
"""Fewer tokens than this are not worth a look even if pruning is on."""
_LEAST_PROMPT = 1024
"""A shorter prompt is dense: its tokens matter and its prefill is quick. `auto` leaves it alone."""


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


def select(scores: jax.Array, droppable: np.ndarray, keep_ratio: float) -> np.ndarray:
    """Which of the new tokens are kept, bool[n], from scores f32[layers, S] (S >= n) and droppable bool[n]."""
    count = len(droppable)
    mask = np.zeros(scores.shape[1], np.bool_)
    mask[:count] = droppable
    kept = _select(scores, mask, np.int32(count), np.int32(budget(int(droppable.sum()), keep_ratio)))
    return np.asarray(kept)[:count]


@jax.jit
def _select(
    scores: Float[Array, "layers tokens"],
    droppable: Bool[Array, " tokens"],
    length: Int[Array, ""],
    budget: Int[Array, ""],
) -> Bool[Array, " tokens"]:
    """Smooths each layer's scores, brings layers to one scale, and lets the most convinced layer speak for a token.

    Layers differ in how sharply they attend: a mean over them drowns the few that find what the question asks for.
    """
    pooled = jax.lax.reduce_window(scores, jnp.float32(0), jax.lax.add, (1, _SMOOTH), (1, 1), "SAME") / _SMOOTH
    weight = droppable.astype(jnp.float32)[None, :]
    count = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
    mean = jnp.sum(pooled * weight, axis=1, keepdims=True) / count
    variance = jnp.sum(jnp.square(pooled - mean) * weight, axis=1, keepdims=True) / count
    deviations = (pooled - mean) * jax.lax.rsqrt(variance + 1e-30)
    return select_tokens(jnp.max(deviations, axis=0), droppable, length, budget, smooth=_SMOOTH)


def rope_positions(kept: np.ndarray, positions: Positions) -> np.ndarray:
    """RoPE positions i32 of the kept tokens of a whole prompt: where they stood in it, or where they stand now."""
    original = np.flatnonzero(kept).astype(np.int32)
    return original if positions == "original" else np.arange(len(original), dtype=np.int32)
