"""Penalties and biases: changes to a row's logits that depend on the tokens before it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """Per slot. `repetition` 1, `presence` 0, `frequency` 0 and `bias` 0 change nothing.

    The host brings `counts` up to date before each visit; what a visit itself commits is counted on the device.
    """

    repetition: Float[Array, " slots"]
    presence: Float[Array, " slots"]
    frequency: Float[Array, " slots"]
    bias: Float[Array, "slots vocab"]
    in_prompt: Bool[Array, "slots vocab"]
    counts: Int[Array, "slots vocab"]
    """How often each token is in the answer."""


def count(counts: Int[Array, "slots vocab"], tokens: Int[Array, "slots tokens"]) -> Int[Array, "slots vocab"]:
    """The counts with these tokens added; a negative one is nobody's."""
    slots, vocabulary = counts.shape
    slot = jnp.arange(slots, dtype=jnp.int32)[:, None]
    return counts.at[slot, jnp.where(tokens < 0, vocabulary, tokens)].add(1, mode="drop")


def penalise(
    logits: Float[Array, "slots vocab"], penalties: Penalties, counts: Int[Array, "slots vocab"]
) -> Float[Array, "slots vocab"]:
    """Logits of one row per slot, given the counts of the answer before that row.

    In this order: the bias is added; logits of tokens in prompt or answer are divided by `repetition` if positive and
    multiplied by it if not (transformers, CTRL's equation in section 4.1); `frequency` times its count and once
    `presence` are taken from each token of the answer (OpenAI).
    """
    logits = logits + penalties.bias
    factor = penalties.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(penalties.in_prompt | (counts > 0), repeated, logits)
    said = jnp.minimum(counts, 1).astype(jnp.float32)
    return logits - penalties.frequency[:, None] * counts.astype(jnp.float32) - penalties.presence[:, None] * said
