"""The chosen path is what a walk, token by token, over the selector's scores gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.speculate.path import CANDIDATES, choose_path
from tests.speculate.test_sampling import parameters, sample
from tests.tiny import DRAFTER, tiny_drafter, tiny_target


def chooser(target, selector):
    """`choose_path` of these networks as one program, as engines run it."""
    return jax.jit(functools.partial(choose_path, target, selector))


def test_path_equals_a_walk_over_scores():
    target = tiny_target()
    selector = tiny_drafter(config=dataclasses.replace(DRAFTER, path_rank=8)).path
    assert selector is not None
    selector.out.weight.set_value(200 * selector.out.weight.get_value())  # loud enough to change proposals
    hidden = jax.random.normal(jax.random.key(4), (2, 6, DRAFTER.hidden_size))
    anchor = jnp.asarray([3, 250], jnp.int32)
    cold = parameters(2, 0.0)
    chosen = np.asarray(chooser(target, selector)(hidden, anchor, cold, jnp.zeros(2, jnp.int32)))
    base = np.asarray(target.project(hidden))
    changed = 0
    for slot in range(2):
        before = int(anchor[slot])
        for row in range(6):
            embedded = target.embed(jnp.asarray([[before]], jnp.int32))[0]
            scores = np.asarray(target.project(selector(hidden[slot, row][None], embedded))[0])
            candidates = np.argsort(-base[slot, row], kind="stable")[:CANDIDATES]
            best = candidates[np.argmax(scores[candidates])]
            changed += best != candidates[0]
            assert chosen[slot, row] == best
            before = int(best)
    assert changed >= 3, "the selector must have something to say in this test"


def test_a_silent_selector_changes_nothing():
    target, config = tiny_target(), dataclasses.replace(DRAFTER, path_rank=8)
    selector = tiny_drafter(config=config).path
    assert selector is not None
    selector.out.weight.set_value(jnp.zeros_like(selector.out.weight.get_value()))
    hidden = jax.random.normal(jax.random.key(5), (1, 9, config.hidden_size))
    anchor, number = jnp.asarray([1], jnp.int32), jnp.zeros(1, jnp.int32)
    choose, choose_without = chooser(target, selector), chooser(target, None)
    chosen = choose(hidden, anchor, parameters(1, 0.0), number)
    np.testing.assert_array_equal(chosen, jnp.argmax(target.project(hidden), axis=-1))
    np.testing.assert_array_equal(choose_without(hidden, anchor, parameters(1, 0.0), number), chosen)
    for temperature in (0.3, 1.0):
        warm = parameters(1, temperature)
        drawn = choose(hidden, anchor, warm, number)
        np.testing.assert_array_equal(drawn, choose_without(hidden, anchor, warm, number))


def test_who_has_the_logits_of_the_target_proposes_what_it_draws():
    target, rows = tiny_target(), 60
    hidden = 4 * jax.random.normal(jax.random.key(6), (2, rows, DRAFTER.hidden_size))
    logits, sampling, number = target.project(hidden), parameters(2, 0.6), jnp.asarray([0, 7], jnp.int32)
    proposals = np.asarray(chooser(target, None)(hidden, jnp.zeros(2, jnp.int32), sampling, number))
    most_likely, right = np.asarray(jnp.argmax(logits, axis=-1)), 0
    for row in range(rows):
        drawn = np.asarray(sample(logits[:, row], sampling, number + row))
        for slot in range(2):
            best = np.argsort(-np.asarray(logits[slot, row]), kind="stable")[:CANDIDATES]
            if drawn[slot] in best:
                assert proposals[slot, row] == drawn[slot]
                right += drawn[slot] != most_likely[slot, row]
    assert right >= 10, "the noise must have something to say in this test"
