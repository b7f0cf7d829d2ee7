"""Training drafts many blocks at once; each must be what decoding drafts for it by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.random_models import random_drafter
from dflash_jax.models.decoder import Place
from dflash_jax.models.drafter import Drafter, block_tokens, empty_drafter_pools
from dflash_jax.train.blocks import draft_blocks, draw_blocks, in_front_of_slots
from dflash_jax.train.learner import initial_parameters
from tests.tiny import DRAFTER, F32, PAGE_SIZE, tiny_drafter, tiny_target

LENGTH = 40


WINDOWS = [((None, None), (False, False)), ((9, 24), (False, True)), ((5, 5), (False, False))]
CONVOLUTION = dataclasses.replace(DRAFTER, convolution_group=16)


@pytest.mark.parametrize(
    ("windows", "causal", "group", "rows"),
    [*((*each, group, 6) for each in WINDOWS for group in (0, 16)), *((*WINDOWS[1], 8, rows) for rows in (2, 4, 12))],
)
@pytest.mark.slow
def test_blocks_equal_those_of_decoding(windows, causal, group, rows):
    config = dataclasses.replace(DRAFTER, windows=windows, causal=causal, convolution_group=group)
    target, drafter = tiny_target(), tiny_drafter(config=config)
    features = jax.random.normal(jax.random.key(3), (1, LENGTH, 2 * config.hidden_size))
    anchors = jnp.asarray([1, 7, 20, 33], jnp.int32)
    embeddings = target.embed(block_tokens(jnp.asarray([5, 9, 11, 13], jnp.int32), config, rows))

    @jax.jit
    def decoded(features, embeddings, anchor):
        pools = empty_drafter_pools(config, num_pages=1 + 4, page_size=PAGE_SIZE, dtype=F32)
        table = jnp.arange(1, 5, dtype=jnp.int32)[None]
        places = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        pools = drafter.read(features, pools, Place(table, jnp.zeros(1, jnp.int32), places, PAGE_SIZE))
        at = Place(table, anchor, anchor[None] + jnp.arange(rows, dtype=jnp.int32)[None], PAGE_SIZE)
        return drafter(embeddings, pools, at)[0]

    together = jax.jit(lambda *each: draft_blocks(drafter, *each))(features, embeddings[None], anchors[None])[0]
    for number in range(len(anchors)):
        one = slice(number, number + 1)
        alone = decoded(features, embeddings[one], anchors[one])
        np.testing.assert_allclose(together[number], alone[0], atol=2e-5)


@pytest.mark.slow
def test_a_convolution_starts_as_one_that_changes_nothing():
    """Whatever the rest has learnt: a drafter that learnt without one drafts the same, to the bit."""
    learnt, features = random_drafter(DRAFTER, 1), jax.random.normal(jax.random.key(3), (1, LENGTH, 96))
    embeddings, anchors = jax.random.normal(jax.random.key(4), (1, 3, 6, 48)), jnp.asarray([[1, 7, 20]], jnp.int32)
    drafts = [
        draft_blocks(Drafter(config, parameters, dtype=F32), features, embeddings, anchors)
        for config, parameters in (
            (DRAFTER, learnt),
            (CONVOLUTION, {**initial_parameters(CONVOLUTION, seed=0), **learnt}),
        )
    ]
    np.testing.assert_array_equal(*drafts)


@pytest.mark.parametrize("config", [DRAFTER, CONVOLUTION])
def test_gradients_pass_on_a_gpu(monkeypatch, config):
    """Its kernels have no derivative, so that training must not reach them: tracing shows whether it does."""
    graph, state = nnx.split(tiny_drafter(config=config))
    features = jnp.ones((1, 80, 2 * config.hidden_size))
    embeddings = jnp.ones((1, 12, 6, config.hidden_size))
    anchors = jnp.arange(12, dtype=jnp.int32)[None]

    def loss(state):
        return jnp.sum(draft_blocks(nnx.merge(graph, state), features, embeddings, anchors))

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gradients = jax.eval_shape(jax.grad(loss), state)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, state)


def test_anchors_stand_in_front_of_answer_tokens_and_slots_count_up_to_its_end():
    tokens = jnp.arange(100, 130, dtype=jnp.int32)[None]
    answers = jnp.zeros((1, 30), jnp.bool_).at[0, 10:18].set(True).at[0, 25:30].set(True)
    blocks = draw_blocks(tokens, answers, jax.random.key(0), blocks=20, block_size=4)
    live = np.asarray(blocks.counts[0, :, 1])
    anchors = np.asarray(blocks.anchors[0])
    assert sorted(anchors[live]) == [*range(9, 17), *range(24, 29)]
    for anchor, slots, counts in zip(anchors[live], blocks.tokens[0][live], blocks.counts[0][live], strict=True):
        end = 18 if anchor < 18 else 30
        assert list(counts) == [False, *(anchor + k < end for k in (1, 2, 3))]
        assert [int(t) for t, c in zip(slots, counts, strict=True) if c] == [
            100 + anchor + k for k in (1, 2, 3) if anchor + k < end
        ]
        assert slots[0] == 100 + anchor


def test_in_front_of_a_slot_stands_the_token_before():
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 1000, jnp.int32)
    blocks = draw_blocks(tokens, jnp.ones((2, 24), jnp.bool_), jax.random.key(0), blocks=9, block_size=5)
    before = np.asarray(in_front_of_slots(tokens[..., None].astype(jnp.float32), blocks))[..., 0]
    assert before.shape == (2, 9, 4)
    inside = np.asarray(blocks.counts[:, :, 1:])
    np.testing.assert_array_equal(before[inside], np.asarray(blocks.tokens)[:, :, :-1][inside])


def test_a_row_without_answers_has_no_live_block():
    blocks = draw_blocks(
        jnp.ones((2, 16), jnp.int32), jnp.zeros((2, 16), jnp.bool_), jax.random.key(0), blocks=3, block_size=4
    )
    assert not blocks.counts.any()
