"""The chosen path is what a walk, token by token, over the selector's scores gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.speculate.path import CANDIDATES, choose_path
from tests.tiny import DRAFTER, tiny_drafter, tiny_target


def test_path_equals_a_walk_over_scores():
    target = tiny_target()
    selector = tiny_drafter(config=dataclasses.replace(DRAFTER, path_rank=8)).path
    assert selector is not None
    selector.out.weight.set_value(200 * selector.out.weight.get_value())  # loud enough to change proposals
    hidden = jax.random.normal(jax.random.key(4), (2, 6, DRAFTER.hidden_size))
    anchor = jnp.asarray([3, 250], jnp.int32)
    chosen = np.asarray(choose_path(target, selector, hidden, anchor))
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
    chosen = choose_path(target, selector, hidden, jnp.asarray([1], jnp.int32))
    np.testing.assert_array_equal(chosen, jnp.argmax(target.project(hidden), axis=-1))
