"""Weights of slots against their closed forms, and what a block is said to commit against a plain count."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.train.loss import score_blocks, slot_weights


def test_d_pace_weights_are_expected_survivors():
    errors = np.asarray([[0.1, 1.0, 3.0]], np.float32)
    survival = np.cumprod(0.5 * np.exp(-errors) + 0.5, axis=1)
    expected = [[survival[0, j:].sum() for j in range(3)]]
    np.testing.assert_allclose(slot_weights(jnp.asarray(errors), "d-pace", 7.0), expected, rtol=1e-6)


def test_decay_halves_where_the_paper_says():
    weights = slot_weights(jnp.zeros((1, 15)), "decay", 7.0)
    np.testing.assert_allclose(weights[0], np.exp(-np.arange(15) / 7.0), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_loss_and_committed_tokens_do_not_depend_on_chunks(chunk):
    generator = np.random.default_rng(0)
    scores = jnp.asarray(generator.standard_normal((4, 3, 11)), jnp.float32)
    labels = np.array(np.argmax(scores, axis=-1))
    labels[1, 1] += 1  # block 1 goes wrong at its second slot
    labels[2, 0] += 1
    labels %= 11
    counts = np.ones((4, 3), np.bool_)
    counts[0, 2] = False  # the answer ends there
    counts[3] = False
    score = score_blocks(
        lambda hidden: hidden,
        scores,
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(counts),
        weighting="decay",
        decay=2.0,
        chunk=chunk,
    )
    assert score.live.tolist() == [True, True, True, False]
    assert score.committed.tolist() == [3, 2, 1, 0]
    logp = np.asarray(scores) - np.log(np.exp(scores).sum(-1, keepdims=True))
    errors = -np.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
    weights = np.exp(-np.arange(3) / 2.0)[None] * counts
    np.testing.assert_allclose(score.loss, (errors * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(score.norm, weights.sum(), rtol=1e-6)


def test_with_opinions_slots_learn_the_distribution_of_the_target():
    generator = np.random.default_rng(1)
    scores, wanted = (generator.standard_normal((2, 3, 7)).astype(np.float32) for _ in range(2))
    labels, counts = np.argmax(wanted, axis=-1), np.asarray([[True, True, True], [True, False, False]])
    arguments = (lambda hidden: hidden, jnp.asarray(scores), jnp.asarray(labels, jnp.int32), jnp.asarray(counts))
    options = {"weighting": "decay", "decay": 2.0, "chunk": 1}
    score = score_blocks(*arguments, jnp.asarray(wanted), **options)
    likely = np.exp(wanted) / np.exp(wanted).sum(-1, keepdims=True)
    errors = -(likely * (scores - np.log(np.exp(scores).sum(-1, keepdims=True)))).sum(-1)
    np.testing.assert_allclose(score.loss, (errors * counts * np.exp(-np.arange(3) / 2.0)).sum(), rtol=1e-5)
    # A target that is sure teaches what the token itself teaches.
    np.testing.assert_allclose(
        score_blocks(*arguments, jnp.asarray(1000 * wanted), **options).loss,
        score_blocks(*arguments, **options).loss,
        rtol=1e-4,
    )
