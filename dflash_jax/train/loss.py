"""What a drafter is punished for: every slot's cross entropy, weighted by how likely decoding gets that far.

A slot is told either which token really follows, or what the target thought of all tokens there, which says more: it
teaches what else the target might have drawn. Logits of all blocks would not fit, so that blocks go through the head in
chunks and logits are computed again in the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Weighting = Literal["d-pace", "decay"]
Labels = Literal["tokens", "target"]
_CONFIDENCE_FLOOR = 0.5
"""D-PACE's alpha: how much of a slot's confidence is taken for granted."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
    """`loss` and its `norm`, summed over blocks; of each block, whether it is `live` and the tokens it would commit."""

    loss: Float[Array, ""]
    norm: Float[Array, ""]
    live: Bool[Array, " blocks"]
    committed: Int[Array, " blocks"]


Logits = Callable[[Float[Array, "blocks slots dim"]], Float[Array, "blocks slots vocab"]]


def score_blocks(
    logits: Logits,
    hidden: Float[Array, "blocks slots dim"],
    labels: Int[Array, "blocks slots"],
    counts: Bool[Array, "blocks slots"],
    opinions: Float[Array, "blocks slots dim"] | None = None,
    *,
    weighting: Weighting,
    decay: float,
    chunk: int,
) -> Score:
    """Scores every slot after the anchor against the token that really follows. `chunk` divides the blocks.

    `opinions` are the target's hidden states from which the same `logits` make its distribution of each slot's token:
    with them slots learn that distribution.
    """

    @jax.checkpoint
    def one(part: tuple[Array, Array, Array, Array | None]) -> Score:
        states, truth, valid, opinion = part
        scores = logits(states)
        total = jax.nn.logsumexp(scores, axis=-1)
        picked = jnp.take_along_axis(scores, truth[..., None], axis=-1)[..., 0]
        errors = jnp.where(valid, total - picked, 0.0)
        weights = jnp.where(valid, slot_weights(errors, weighting, decay), 0.0)
        if opinion is not None:
            likely = jax.lax.stop_gradient(jax.nn.softmax(logits(opinion), axis=-1))
            errors = jnp.where(valid, total - jnp.sum(likely * scores, axis=-1), 0.0)
        live = valid[:, 0]
        norm = jnp.sum(weights) if weighting == "decay" else jnp.sum(live.astype(jnp.float32))
        right = (jnp.argmax(scores, axis=-1) == truth) & valid
        committed = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1) + 1
        return Score(jnp.sum(weights * errors), norm, live, jnp.where(live, committed, 0))

    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (hidden, labels, counts, opinions))
    scores = jax.lax.map(one, parts)
    return Score(jnp.sum(scores.loss), jnp.sum(scores.norm), scores.live.reshape(-1), scores.committed.reshape(-1))


def slot_weights(
    errors: Float[Array, "blocks slots"], weighting: Weighting, decay: float
) -> Float[Array, "blocks slots"]:
    """How much each slot counts.

    `decay`: exp(-k / decay) for the k-th slot (DFlash, appendix A.1). `d-pace` (arXiv 2605.18810): the expected number
    of tokens from this slot on that survive, by the drafter's own confidence.
    """
    slots = errors.shape[1]
    if weighting == "decay":
        return jnp.broadcast_to(jnp.exp(-jnp.arange(slots, dtype=jnp.float32) / decay)[None, :], errors.shape)
    confidence = (1 - _CONFIDENCE_FLOOR) * jnp.exp(-jax.lax.stop_gradient(errors)) + _CONFIDENCE_FLOOR
    survival = jnp.cumprod(confidence, axis=1)
    return jnp.flip(jnp.cumsum(jnp.flip(survival, axis=1), axis=1), axis=1)
