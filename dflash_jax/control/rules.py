"""How a session's keep ratio follows what is observed: pure functions, to be jitted and vmapped at will.

The idea is the seed engine's: a drafter guesses worse when the target has lost the thread, so accept length is a free
measure of whether too much was pruned. docs/controller.md derives the rules and shows how they behave.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dflash_jax.control.state import ControllerState, Observation

Rule = Literal["classic", "relative"]

BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Where a rule starts and what it never leaves."""

    start: float
    lowest: float
    highest: float


BOUNDS: dict[Rule, Bounds] = {
    "classic": Bounds(start=0.10, lowest=0.025, highest=0.20),
    # At a quarter a planted fact is found as often as in the whole prompt (docs/pflash.md): a start that costs
    # no quality.
    "relative": Bounds(start=0.25, lowest=0.05, highest=0.80),
}
_CLASSIC_BAND = (0.75, 0.85)
_CLASSIC_FAR = (0.70, 0.90)
_EMA_WEIGHT = 0.3
_EXPECTATION_WEIGHT = 0.1
_FALLING, _STEADY = 0.85, 0.95
"""Shares of the expected accept length below which quality falls, and above which less may be kept."""
_MORE, _LESS, _MUCH_MORE = 1.25, 0.95, 2.0
"""Factors on the keep ratio: quality fell, quality is steady, the answer degenerated."""


def initial(rule: Rule = "relative", keep_ratio: float | None = None) -> ControllerState:
    """The state of a new session. Raises ValueError for an unknown rule."""
    if rule not in get_args(Rule):
        raise ValueError(f"unknown controller rule {rule!r}: expected one of {', '.join(get_args(Rule))}")
    start = BOUNDS[rule].start if keep_ratio is None else keep_ratio
    return ControllerState(
        keep_ratio=jnp.float32(start), ema=jnp.float32(0), expectation=jnp.float32(0), turns=jnp.int32(0)
    )


def update(rule: Rule, state: ControllerState, observation: Observation) -> ControllerState:
    """The state after a turn. A turn that drafted nothing, or whose accept length is not a number, leaves it as it was;
    a degenerate answer to a pruned prompt counts even then.

    `rule` is static; the other arguments may be batched.
    """
    accept_length = jnp.asarray(observation.accept_length, jnp.float32)
    steps, compressed = jnp.asarray(observation.steps), jnp.asarray(observation.compressed)
    counts = (steps > 0) & jnp.isfinite(accept_length) & (accept_length > 0)
    follow = _classic if rule == "classic" else _relative
    followed = follow(state, jnp.where(counts, accept_length, 1.0), compressed)
    new = ControllerState(
        keep_ratio=jnp.where(counts, followed.keep_ratio, state.keep_ratio),
        ema=jnp.where(counts, followed.ema, state.ema),
        expectation=jnp.where(counts, followed.expectation, state.expectation),
        turns=state.turns + counts.astype(jnp.int32),
    )
    failed = jnp.asarray(observation.degenerate) & compressed
    keep_ratio = jnp.where(failed, jnp.maximum(new.keep_ratio, state.keep_ratio * _MUCH_MORE), new.keep_ratio)
    bounds = BOUNDS[rule]
    bounded = jnp.clip(keep_ratio, bounds.lowest, bounds.highest)
    return dataclasses.replace(new, keep_ratio=jnp.where(counts | failed, bounded, state.keep_ratio))


def _classic(
    state: ControllerState, accept_length: Float[Array, "*sessions"], compressed: Bool[Array, "*sessions"]
) -> ControllerState:
    """The seed's rule: a fixed band for the share of a block that is accepted, steps of 0.005 or, far outside, 0.01."""
    del compressed
    share = accept_length / BLOCK_SIZE
    ema = jnp.where(state.turns == 0, share, (1 - _EMA_WEIGHT) * state.ema + _EMA_WEIGHT * share)
    low, high = _CLASSIC_BAND
    too_low, too_high = _CLASSIC_FAR
    step = jnp.where(ema < low, jnp.where(ema < too_low, 0.01, 0.005), 0.0)
    step = jnp.where(ema > high, jnp.where(ema > too_high, -0.01, -0.005), step)
    return dataclasses.replace(state, keep_ratio=state.keep_ratio + step, ema=ema)


def _relative(
    state: ControllerState, accept_length: Float[Array, "*sessions"], compressed: Bool[Array, "*sessions"]
) -> ControllerState:
    """Compares a session's compressed turns with what the same session reaches without compression."""
    known = state.expectation > 0
    # A turn that read most of its prompt is nearly a turn without compression: it may correct a first turn that was
    # lucky.
    weight = _EXPECTATION_WEIGHT * jnp.where(compressed, jnp.square(state.keep_ratio), 1.0)
    moved = (1 - weight) * state.expectation + weight * accept_length
    expectation = jnp.where(known, moved, accept_length)
    ema = jnp.where(state.ema > 0, (1 - _EMA_WEIGHT) * state.ema + _EMA_WEIGHT * accept_length, accept_length)
    ema = jnp.where(compressed, ema, state.ema)
    quality = ema / expectation
    factor = jnp.where(quality < _FALLING, _MORE, jnp.where(quality > _STEADY, _LESS, 1.0))
    factor = jnp.where(compressed, factor, 1.0)
    return dataclasses.replace(state, keep_ratio=state.keep_ratio * factor, ema=ema, expectation=expectation)
