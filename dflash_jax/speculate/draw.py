"""The target's own tokens at the rows of a block: one row after the other, each given those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dflash_jax.speculate.logprobs import Logprobs, logprobs_of, no_logprobs
from dflash_jax.speculate.penalties import count, penalise
from dflash_jax.speculate.sampling import Extras, SamplingParameters, greedy, sample

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """A token for each row, and its log-probabilities if some slot asks for them.

    Only the rows up to the first one that rejects a proposal, in the slot that goes furthest, mean anything.
    """

    tokens: Int[Array, "slots rows"]
    logprobs: Logprobs


def draw(
    logits: Float[Array, "slots rows vocab"],
    sampling: SamplingParameters,
    number: Int[Array, " slots"],
    proposals: Int[Array, "slots proposals"],
    recent: Int[Array, "slots recent"],
) -> Drawn:
    """Draws rows one after the other, only as far as some slot still accepts.

    `number` counts the tokens of the answer before the block; `recent` has those that `Penalties.counts` lacks, -1 for
    none. Slots that ask for nothing special never run what others ask for: it is a branch of its own.
    """
    slots, rows, vocabulary = logits.shape
    nothing = no_logprobs(slots, rows, vocabulary)
    padded = jnp.pad(proposals, ((0, 0), (0, 1)), constant_values=-1)
    start = (jnp.int32(0), jnp.ones(slots, jnp.bool_), Drawn(jnp.zeros((slots, rows), jnp.int32), nothing))

    def agreeing(carry: tuple[Any, ...]) -> Array:
        return (carry[0] < rows) & jnp.any(carry[1])

    def drawn_greedily() -> Drawn:
        return Drawn(greedy(logits), nothing)

    def sampled() -> Drawn:
        def step(carry: tuple[Array, Array, Drawn]) -> tuple[Array, Array, Drawn]:
            row, agrees, drawn = carry
            token = sample(_row(logits, row), sampling, number + row)
            drawn = dataclasses.replace(drawn, tokens=with_row(drawn.tokens, token[:, None], row))
            return row + 1, agrees & (token == _row(padded, row)), drawn

        return jax.lax.while_loop(agreeing, step, start)[2]

    def special(extras: Extras, warm: Array) -> Drawn:
        def step(carry: tuple[Array, Array, Drawn, Array]) -> tuple[Array, Array, Drawn, Array]:
            row, agrees, drawn, counts = carry
            found = draw_penalised(_row(logits, row), sampling, extras, number, row, counts, warm)
            drawn = jax.tree.map(lambda all, one: with_row(all, one, row), drawn, found)
            # Where the next row matters, this row's token is its proposal.
            return row + 1, agrees & (found.tokens[:, 0] == _row(padded, row)), drawn, count(counts, found.tokens)

        counts = count(extras.penalties.counts, recent)
        return jax.lax.while_loop(agreeing, step, (*start, counts))[2]

    return as_asked(sampling, drawn_greedily, sampled, special)


def as_asked(
    sampling: SamplingParameters,
    greedily: Callable[[], T],
    sampled: Callable[[], T],
    special: Callable[[Extras, Bool[Array, ""]], T],
) -> T:
    """Draws in the cheapest of three ways that gives all slots what they ask for.

    `special` gets the extras, and whether any slot has a temperature.
    """
    warm, extras = jnp.any(sampling.temperature > 0), sampling.extras
    if extras is None:
        return jax.lax.cond(warm, sampled, greedily)
    case = jnp.where(jnp.any(extras.asked), 2, warm.astype(jnp.int32))
    return jax.lax.switch(case, (greedily, sampled, lambda: special(extras, warm)))


def draw_penalised(
    logits: Float[Array, "slots vocab"],
    sampling: SamplingParameters,
    extras: Extras,
    number: Int[Array, " slots"],
    row: Int[Array, ""],
    counts: Int[Array, "slots vocab"],
    warm: Bool[Array, ""],
) -> Drawn:
    """Token `number + row` of each answer, with what `extras` ask for; `counts` are those of the answer before it.

    `warm` says whether any slot has a temperature.
    """
    scores = penalise(logits, extras.penalties, counts)
    token = jax.lax.cond(warm, lambda: sample(scores, sampling, number + row), lambda: greedy(scores))
    return Drawn(token[:, None], logprobs_of(logits, token))


def with_row(values: Array, one: Array, row: Array) -> Array:
    """[slots, rows, ...] with row number `row` of every slot replaced by `one`, which is [slots, 1, ...]."""
    return jax.lax.dynamic_update_slice_in_dim(values, one, row, axis=1)


def _row(values: Array, row: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(values, row, axis=1, keepdims=False)
