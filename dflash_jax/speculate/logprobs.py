"""Log-probabilities of committed tokens by the model itself: before biases, penalties and temperature."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TOP = 20
"""Alternatives that are looked up per token; what a request may ask for at most."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Per token: itself, then the most likely tokens, best first, with natural logarithms of their probabilities."""

    ids: Int[Array, "slots rows choices"]
    values: Float[Array, "slots rows choices"]


def no_logprobs(slots: int, rows: int, vocabulary: int) -> Logprobs:
    """Zeros, where nobody asks."""
    shape = (slots, rows, 1 + min(TOP, vocabulary))
    return Logprobs(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def logprobs_of(logits: Float[Array, "slots vocab"], tokens: Int[Array, " slots"]) -> Logprobs:
    """Of one row per slot, in which `tokens` were drawn: [slots, 1, choices]."""
    normalised = jax.nn.log_softmax(logits, axis=-1)
    # Without the barrier XLA's CPU compiler does not see a top-k in a loop and sorts the whole vocabulary (jax 0.10).
    best = jax.lax.top_k(normalised, min(TOP, logits.shape[-1]))
    top, top_ids = jax.lax.optimization_barrier(tuple(best))
    own = jnp.take_along_axis(normalised, tokens[:, None], axis=-1)
    ids = jnp.concatenate([tokens[:, None], top_ids.astype(jnp.int32)], axis=-1)
    return Logprobs(ids[:, None], jnp.concatenate([own, top], axis=-1)[:, None])
