"""The most likely path through a block: each proposal given the one before it.

The drafter's pass is parallel, so its rows know nothing of each other's tokens. The path selector (models/drafter.py)
scores, for every row, the best candidates given each candidate of the row before. All pairs are scored at once; what
remains in sequence is looking up, row by row, the winner after the winner.

Where the target draws its tokens, the winner is the candidate that it would draw if its logits were these: the noise is
the one that the target will use. The target's draw stays its own, whatever was guessed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.models.decoder import Decoder
from dflash_jax.models.drafter import PathSelector
from dflash_jax.speculate.sampling import SamplingParameters, greedy, lifted
from pallas_kernels.best_tokens.api import best_tokens

CANDIDATES = 8
"""Tokens of a row that a path may take."""


def choose_path(
    target: Decoder,
    selector: PathSelector | None,
    hidden: Float[Array, "slots rows dim"],
    anchor: Int[Array, " slots"],
    sampling: SamplingParameters,
    number: Int[Array, " slots"],
) -> Int[Array, "slots rows"]:
    """Proposals for the rows after the anchor, tokens `number..` of the answer, from the drafter's hidden states.

    Without a selector the rows know nothing of each other.
    """
    slots, rows, _ = hidden.shape
    logits = target.project(hidden)
    if selector is None:
        warm = jnp.any(sampling.temperature > 0)
        return jax.lax.cond(warm, lambda: _drawn(logits, sampling, number), lambda: greedy(logits))
    candidates, scores = _pairs(target, selector, hidden, logits, anchor)
    scores = lifted(scores, candidates, sampling, number)
    winner = jnp.argmax(scores, axis=-1)  # [slots, rows, K]: the best candidate after each candidate of the row before
    taken, chosen = jnp.zeros(slots, jnp.int32), []
    for row in range(rows):
        taken = jnp.take_along_axis(winner[:, row], taken[:, None], axis=1)[:, 0]
        chosen.append(jnp.take_along_axis(candidates[:, row], taken[:, None], axis=1)[:, 0])
    return jnp.stack(chosen, axis=1)


def score_pairs(
    target: Decoder,
    selector: PathSelector | None,
    hidden: Float[Array, "slots rows dim"],
    anchor: Int[Array, " slots"],
    sampling: SamplingParameters,
    number: Int[Array, " slots"],
) -> tuple[Int[Array, "slots rows K"], Float[Array, "slots rows K K"]]:
    """The candidates of each row, and what decides between them after each candidate of the row before.

    Arguments are those of `choose_path`. The first row comes after the anchor alone, whatever the candidate before. A
    token that a row has twice among its candidates, as it may where the head leaves few, can be chosen once.
    """
    logits = target.project(hidden)
    if selector is None:
        candidates, scores = _alone(logits)
    else:
        candidates, scores = _pairs(target, selector, hidden, logits, anchor)
    count = candidates.shape[-1]
    again = jnp.any(jnp.tril(candidates[..., :, None] == candidates[..., None, :], -1), axis=-1)
    scores = jnp.where(again[:, :, None], -jnp.inf, lifted(scores, candidates, sampling, number))
    return candidates, jnp.broadcast_to(scores, (*candidates.shape[:2], count, count))


def _pairs(
    target: Decoder,
    selector: PathSelector,
    hidden: Float[Array, "slots rows dim"],
    logits: Float[Array, "slots rows vocab"],
    anchor: Int[Array, " slots"],
) -> tuple[Int[Array, "slots rows K"], Float[Array, "slots rows K K"]]:
    """The candidates of each row, and their logits after each candidate of the row before."""
    slots, candidates = len(anchor), _candidates(logits)
    first = jnp.broadcast_to(anchor[:, None, None], (slots, 1, candidates.shape[-1]))
    before = jnp.concatenate([first, candidates[:, :-1]], axis=1)
    embedded = target.embed(before.reshape(slots, -1)).reshape(*before.shape, -1)
    corrected = selector(hidden[:, :, None], embedded)
    directions = target.head_rows(candidates.reshape(slots, -1)).reshape(*before.shape, -1)
    scores = jnp.einsum("srad,srbd->srab", corrected, directions, preferred_element_type=jnp.float32)
    return candidates, target.capped(scores)


def _drawn(
    logits: Float[Array, "slots rows vocab"], sampling: SamplingParameters, number: Int[Array, " slots"]
) -> Int[Array, "slots rows"]:
    """What the target would draw if these were its logits."""
    candidates, own = _alone(logits)
    winner = jnp.argmax(lifted(own, candidates, sampling, number), axis=-1)
    return jnp.take_along_axis(candidates, winner, axis=-1)[:, :, 0]


def _alone(
    logits: Float[Array, "slots rows vocab"],
) -> tuple[Int[Array, "slots rows K"], Float[Array, "slots rows 1 K"]]:
    """The candidates of each row and their logits, whatever the row before takes."""
    candidates = _candidates(logits)
    return candidates, jnp.take_along_axis(logits, candidates, axis=-1)[:, :, None]


def _candidates(logits: Float[Array, "slots rows vocab"]) -> Int[Array, "slots rows K"]:
    flat = logits.reshape(-1, logits.shape[-1])
    return best_tokens(flat, count=min(CANDIDATES, flat.shape[1])).reshape(*logits.shape[:2], -1)
