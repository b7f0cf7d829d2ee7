"""What the controller's rules promise, on simulated sessions.

The classic rule is compared with a transcription of the seed's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.control.rules import BOUNDS, Rule, initial, update
from dflash_jax.control.state import ControllerState, Observation

RULES = get_args(Rule)


def observe(accept_length: float, *, steps: int = 8, degenerate: bool = False, compressed: bool = True) -> Observation:
    return Observation(jnp.float32(accept_length), jnp.int32(steps), jnp.asarray(degenerate), jnp.asarray(compressed))


def follow(rule: Rule, observations: Iterable[Observation], state: ControllerState | None = None) -> ControllerState:
    state = initial(rule) if state is None else state
    step = jax.jit(update, static_argnums=0)
    for observation in observations:
        state = step(rule, state, observation)
    return state


def values(state: ControllerState) -> dict[str, Any]:
    return {field.name: np.asarray(getattr(state, field.name)) for field in dataclasses.fields(state)}


def assert_same(actual: ControllerState, expected: ControllerState) -> None:
    for name, value in values(expected).items():
        np.testing.assert_array_equal(values(actual)[name], value, err_msg=name)


@pytest.mark.parametrize(("rule", "good", "bad"), [("classic", 13.0, 6.0), ("relative", 6.0, 3.0)])
def test_falling_quality_keeps_more(rule: Rule, good: float, bad: float) -> None:
    settled = follow(rule, [observe(good, compressed=False), *[observe(good)] * 4])
    fallen = follow(rule, [observe(bad)] * 6, settled)
    assert fallen.keep_ratio > settled.keep_ratio


@pytest.mark.parametrize(("rule", "good"), [("classic", 15.0), ("relative", 6.0)])
def test_a_stable_session_keeps_less_down_to_the_lower_bound(rule: Rule, good: float) -> None:
    early = follow(rule, [observe(good, compressed=False), *[observe(good)] * 3])
    assert early.keep_ratio < initial(rule).keep_ratio
    late = follow(rule, [observe(good)] * 60, early)
    assert float(late.keep_ratio) == pytest.approx(BOUNDS[rule].lowest)


def test_relative_judges_a_session_by_its_own_accept_length() -> None:
    """A drafter that never guesses much says nothing about pruning; the classic rule takes it for lost quality."""
    session = [observe(2.5, compressed=False), *[observe(2.5)] * 10]
    assert follow("relative", session).keep_ratio < initial("relative").keep_ratio
    assert follow("classic", session).keep_ratio > initial("classic").keep_ratio


def test_relative_moves_only_after_compressed_turns() -> None:
    state = follow("relative", [observe(accept, compressed=False) for accept in (6.0, 2.0, 9.0)])
    assert state.keep_ratio == initial("relative").keep_ratio
    assert float(state.expectation) == pytest.approx(0.9 * (0.9 * 6 + 0.1 * 2) + 0.1 * 9)
    assert float(state.ema) == 0


def test_relative_leaves_the_keep_ratio_between_its_thresholds() -> None:
    whole = follow("relative", [observe(10.0, compressed=False)])
    for accept, factor in ((8.4, 1.25), (8.6, 1.0), (9.4, 1.0), (9.6, 0.95)):
        after = follow("relative", [observe(accept)], whole)
        assert float(after.keep_ratio) == pytest.approx(float(whole.keep_ratio) * factor), accept


@pytest.mark.parametrize("rule", RULES)
def test_no_observation_leads_out_of_the_bounds(rule: Rule) -> None:
    sessions, turns = 4096, 50
    rng = np.random.default_rng(0)
    accept = rng.uniform(0.5, 17, (turns, sessions)).astype(np.float32)
    # A random walk of accept lengths would hover; long runs of very good or very bad turns push against the bounds.
    accept[:, : sessions // 4] = 1.0
    accept[:, sessions // 4 : sessions // 2] = 16.0
    accept[rng.random(accept.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -3.0, 1e30])
    observations = Observation(
        jnp.asarray(accept),
        jnp.asarray(rng.integers(0, 5, accept.shape).astype(np.int32)),
        jnp.asarray(rng.random(accept.shape) < 0.1),
        jnp.asarray(rng.random(accept.shape) < 0.7),
    )

    def turn(state: ControllerState, observation: Observation) -> tuple[ControllerState, ControllerState]:
        new = jax.vmap(lambda s, o: update(rule, s, o))(state, observation)
        return new, new

    start = jax.tree.map(lambda leaf: jnp.full((sessions,), leaf), initial(rule))
    _, states = jax.jit(lambda s, o: jax.lax.scan(turn, s, o))(start, observations)
    bounds = BOUNDS[rule]
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(states)])).all()
    assert float(states.keep_ratio.min()) == pytest.approx(bounds.lowest, abs=1e-7)
    assert float(states.keep_ratio.max()) == pytest.approx(bounds.highest, abs=1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("accept", "steps"), [(np.nan, 8), (np.inf, 8), (-np.inf, 8), (0.0, 8), (-1.0, 8), (5.0, 0), (np.nan, 0)]
)
def test_a_turn_without_a_measurement_changes_nothing(rule: Rule, accept: float, steps: int, compressed: bool) -> None:
    settled = follow(rule, [observe(6.0, compressed=False), observe(5.0), observe(7.0)])
    outside = dataclasses.replace(settled, keep_ratio=jnp.float32(0.9))
    for before in (initial(rule), settled, outside):
        assert_same(follow(rule, [observe(accept, steps=steps, compressed=compressed)], before), before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("accept", "steps"), [(5.0, 0), (np.nan, 8), (16.0, 8)])
def test_a_degenerate_answer_to_a_pruned_prompt_keeps_more(rule: Rule, accept: float, steps: int) -> None:
    before = follow(rule, [observe(6.0, compressed=False), observe(6.0)])
    after = follow(rule, [observe(accept, steps=steps, degenerate=True)], before)
    assert float(after.keep_ratio) == pytest.approx(min(2 * float(before.keep_ratio), BOUNDS[rule].highest))
    if steps == 0:
        assert_same(dataclasses.replace(after, keep_ratio=before.keep_ratio), before)


@pytest.mark.parametrize("rule", RULES)
def test_a_degenerate_answer_to_a_whole_prompt_says_nothing_of_pruning(rule: Rule) -> None:
    before = follow(rule, [observe(6.0, compressed=False), observe(6.0)])
    plain, degenerate = (
        follow(rule, [observe(6.0, compressed=False, degenerate=flag)], before) for flag in (False, True)
    )
    assert_same(degenerate, plain)


@pytest.mark.parametrize("rule", RULES)
def test_jit_and_vmap_compute_what_eager_execution_does(rule: Rule) -> None:
    rng = np.random.default_rng(3)
    turns = [
        observe(accept, steps=int(steps), degenerate=bool(flags[0]), compressed=bool(flags[1]))
        for accept, steps, flags in zip(
            [*rng.uniform(1, 16, 11), np.nan], rng.integers(0, 3, 12), rng.random((12, 2)) < 0.4, strict=True
        )
    ]
    eager = jitted = initial(rule)
    mapped = jax.tree.map(lambda leaf: leaf[None], eager)
    for turn in turns:
        eager = update(rule, eager, turn)
        jitted = jax.jit(update, static_argnums=0)(rule, jitted, turn)
        mapped = jax.vmap(lambda s, o: update(rule, s, o))(mapped, jax.tree.map(lambda leaf: leaf[None], turn))
        for name, value in values(eager).items():
            np.testing.assert_allclose(values(jitted)[name], value, rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(values(mapped)[name][0], value, rtol=1e-6, err_msg=name)


def seed_rule(accept_lengths: Iterable[float]) -> list[float]:
    """The seed engine's bandit, written down from its description: keep ratios after each turn."""
    keep, ema, kept = 0.10, None, []
    for accept_length in accept_lengths:
        share = accept_length / 16
        ema = share if ema is None else 0.7 * ema + 0.3 * share
        if ema < 0.70:
            keep += 0.01
        elif ema < 0.75:
            keep += 0.005
        elif ema > 0.90:
            keep -= 0.01
        elif ema > 0.85:
            keep -= 0.005
        keep = min(max(keep, 0.025), 0.20)
        kept.append(keep)
    return kept


@pytest.mark.parametrize(("low", "high"), [(1, 16), (11, 15), (13, 16), (12.1, 13.5)])
def test_classic_is_the_seeds_rule(low: float, high: float) -> None:
    accept_lengths = np.random.default_rng(7).uniform(low, high, 80)
    state, kept = initial("classic"), []
    step = jax.jit(update, static_argnums=0)
    for turn, accept_length in enumerate(accept_lengths):
        state = step("classic", state, observe(accept_length, compressed=turn % 3 > 0))
        kept.append(float(state.keep_ratio))
    np.testing.assert_allclose(kept, seed_rule(accept_lengths), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_session_starts_where_the_rule_or_the_user_says(rule: Rule) -> None:
    assert float(initial(rule).keep_ratio) == pytest.approx(BOUNDS[rule].start)
    assert float(initial(rule, 0.6).keep_ratio) == pytest.approx(0.6)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown controller rule 'best': expected one of classic, relative"):
        initial("best")  # type: ignore[arg-type]
