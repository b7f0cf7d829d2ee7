"""Experts of rows that nobody reads: they cost nothing, and nobody sees them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from dflash_jax.models.decoder import Decoder
from dflash_jax.models.experts import Experts
from dflash_jax.models.layers import below
from dflash_jax.speculate.step import Slots, _source
from pallas_kernels.expert_choice.api import choose_experts


@pytest.fixture(scope="module")
def decoder(goldens: Path) -> Decoder:
    loaded = checkpoints.load(goldens / "gemma4_experts")
    return Decoder(loaded.config, loaded.parameters, dtype=jnp.float32)


def slots(live: list[bool]) -> Slots:
    zeros = jnp.zeros(len(live), jnp.int32)
    return Slots(zeros[:, None], zeros, zeros, zeros, zeros, zeros + 9, zeros[:, None] - 1, jnp.asarray(live))


def test_rows_that_cannot_be_committed_follow_the_first_that_can() -> None:
    proposals = jnp.asarray([[3, -1], [4, 0]])
    assert _source(slots([True, True]), proposals).tolist() == [0, 1, 0, 3, 4, 5]
    assert _source(slots([False, True]), proposals).tolist() == [3, 3, 3, 3, 4, 5]
    assert _source(slots([False, False]), proposals).tolist() == [0] * 6
    assert _source(slots([True]), jnp.full((1, 3), -1)).tolist() == [0] * 4
    assert _source(slots([False, True]), jnp.zeros((2, 0), jnp.int32)).tolist() == [1, 1]


@pytest.mark.usefixtures("optimised")
def test_rows_that_follow_another_choose_its_experts_and_change_no_other_row(decoder: Decoder) -> None:
    feed_forward = decoder.layers[0].feed_forward
    experts = feed_forward.experts
    assert experts is not None
    x, beside = jax.random.normal(jax.random.key(0), (2, 1, 6, decoder.config.hidden_size))
    source = jnp.asarray([0, 1, 2, 2, 2, 5])
    every, some = experts(x, beside[None], None), experts(x, beside[None], source)
    np.testing.assert_array_equal(some[0, source == jnp.arange(6)], every[0, source == jnp.arange(6)])
    router = [each.get_value() for each in (experts.router, experts.router_scale, experts.scale, experts.norm)]
    chosen = choose_experts(x[0], *router, source, active=experts.config.active, eps=experts.eps).chosen
    assert (chosen[3:5] == chosen[2:3]).all() and len(np.unique(chosen[2:5])) == experts.config.active


def test_experts_need_a_config_that_has_them(decoder: Decoder, goldens: Path) -> None:
    loaded = checkpoints.load(goldens / "gemma4")
    with pytest.raises(ValueError, match="no experts"):
        Experts(below(loaded.parameters, "experts."), jnp.ones(8), loaded.config)
