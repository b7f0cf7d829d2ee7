"""The most likely path through a block: each proposal given the one before it.

The drafter's pass is parallel, so its rows know nothing of each other's tokens. The path selector (models/drafter.py)
scores, for every row, the best candidates given each candidate of the row before. All pairs are scored at once; what
remains in sequence is looking up, row by row, the winner after the winner.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.models.decoder import Decoder
from dflash_jax.models.drafter import PathSelector
from pallas_kernels.best_tokens.api import best_tokens

CANDIDATES = 8
"""Tokens of a row that a path may take."""


def choose_path(
    target: Decoder, selector: PathSelector, hidden: Float[Array, "slots rows dim"], anchor: Int[Array, " slots"]
) -> Int[Array, "slots rows"]:
    """Proposals for the rows after the anchor, from the drafter's hidden states of these rows."""
    slots, rows, _ = hidden.shape
    logits = target.project(hidden).reshape(slots * rows, -1)
    candidates = best_tokens(logits, count=min(CANDIDATES, logits.shape[1])).reshape(slots, rows, -1)
    first = jnp.broadcast_to(anchor[:, None, None], (slots, 1, candidates.shape[-1]))
    before = jnp.concatenate([first, candidates[:, :-1]], axis=1)
    embedded = target.embed(before.reshape(slots, -1)).reshape(*before.shape, -1)
    corrected = selector(hidden[:, :, None], embedded)
    directions = target.head_rows(candidates.reshape(slots, -1)).reshape(*before.shape, -1)
    scores = jnp.einsum("srad,srbd->srab", corrected, directions, preferred_element_type=jnp.float32)
    winner = jnp.argmax(scores, axis=-1)  # [slots, rows, K]: the best candidate after each candidate of the row before
    taken, chosen = jnp.zeros(slots, jnp.int32), []
    for row in range(rows):
        taken = jnp.take_along_axis(winner[:, row], taken[:, None], axis=1)[:, 0]
        chosen.append(jnp.take_along_axis(candidates[:, row], taken[:, None], axis=1)[:, 0])
    return jnp.stack(chosen, axis=1)
