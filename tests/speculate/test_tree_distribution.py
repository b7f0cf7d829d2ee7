"""Sampled answers have exactly the target's distribution with trees too; a walk that is biased fails the same test."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.models.decoder import Decoder
from dflash_jax.speculate import step
from dflash_jax.speculate.loop import decode
from dflash_jax.speculate.sampling import SamplingParameters
from dflash_jax.speculate.walk import Walked, walk
from pallas_kernels.draft_tree.api import Tree
from tests.speculate import test_distribution
from tests.speculate.test_distribution import (
    LEAST_P,
    SETTINGS,
    SLOTS_EACH,
    exact,
    logits,
    make_answer,
    p_value,
    parameters_of,
    tables_of,
    target,
)

__all__ = ["logits", "target"]  # fixtures
pytestmark = pytest.mark.slow
ROWS = 11
DRAFTERS = ("good", "bad", "always the least likely", "always the end")
Logits = dict[tuple[int, ...], np.ndarray]


def decode_with_trees(*arguments: Any, rows: int, capacity: int, **options: Any) -> Any:
    """`decode` with trees as deep as a chain of `rows` rows is long."""
    return decode(*arguments, rows=ROWS, capacity=capacity + ROWS, tree=True, **options)


@pytest.fixture(autouse=True, scope="module")
def trees() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_distribution, "decode", decode_with_trees)
        yield


@pytest.fixture(scope="module")
def answers(target: Decoder, logits: Logits) -> dict[str, np.ndarray]:
    answer, parameters = make_answer(target), parameters_of(list(SETTINGS.values()), SLOTS_EACH)
    return {name: answer(parameters, tables_of(logits)[name]) for name in ("none", *DRAFTERS)}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_answers_have_the_targets_distribution(
    answers: dict[str, np.ndarray], logits: Logits, drafter: str, setting: str
) -> None:
    first = list(SETTINGS).index(setting) * SLOTS_EACH
    found = answers[drafter][first : first + SLOTS_EACH]
    assert p_value(found, exact(logits, SETTINGS[setting])) > LEAST_P


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_seed_gives_the_answer_that_it_gives_without_a_drafter(answers: dict[str, np.ndarray], drafter: str) -> None:
    np.testing.assert_array_equal(answers[drafter], answers["none"])


def likely_children_are_taken(
    logits: jax.Array,
    sampling: SamplingParameters,
    number: jax.Array,
    tree: Tree,
    recent: jax.Array,
    *,
    levels: int,
) -> Walked:
    """Takes the first node without a draw where it is likely, as a rule for chains might."""
    likely = jax.nn.softmax(logits[:, 0], axis=-1)
    chance = jnp.take_along_axis(likely, tree.tokens[:, 1:2], axis=-1)
    raised = jnp.put_along_axis(logits[:, 0], tree.tokens[:, 1:2], jnp.float32(50), axis=-1, inplace=False)
    biased = logits.at[:, 0].set(jnp.where(chance > 0.25, raised, logits[:, 0]))
    return walk(biased, sampling, number, tree, recent, levels=levels)


def every_sibling_has_a_draw(
    logits: jax.Array,
    sampling: SamplingParameters,
    number: jax.Array,
    tree: Tree,
    recent: jax.Array,
    *,
    levels: int,
) -> Walked:
    """Draws once for the anchor's first child and, where that is refused, once more for the others."""
    again = dataclasses.replace(sampling, seed=sampling.seed + jnp.uint32(1))
    first, second = (walk(logits, each, number, tree, recent, levels=levels) for each in (sampling, again))
    keep = first.drawn.tokens[:, 0] == tree.tokens[:, 1]

    def pick(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(keep, range(1, one.ndim)), one, other)

    return jax.tree.map(pick, first, second)


@pytest.mark.parametrize("rule", [likely_children_are_taken, every_sibling_has_a_draw])
def test_a_walk_that_is_biased_fails(
    monkeypatch: pytest.MonkeyPatch, target: Decoder, logits: Logits, rule: Any
) -> None:
    monkeypatch.setattr(step, "walk", rule)
    parameters = parameters_of([SETTINGS["plain"]], SLOTS_EACH)
    found = make_answer(target)(parameters, tables_of(logits)["good"])
    assert p_value(found, exact(logits, SETTINGS["plain"])) < LEAST_P**3
