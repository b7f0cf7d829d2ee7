from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.speculate import sampling
from dflash_jax.speculate.sampling import SamplingParameters, greedy

sample = jax.jit(sampling.sample)
"""One program, as engines run it; called as it stands, its loops and branches are compiled again each time."""


def parameters(
    count: int, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingParameters:
    seeds = np.stack([np.zeros(count), np.arange(count)], axis=1)
    return SamplingParameters(
        temperature=jnp.full(count, temperature, jnp.float32),
        top_k=jnp.full(count, top_k, jnp.int32),
        top_p=jnp.full(count, top_p, jnp.float32),
        min_p=jnp.full(count, min_p, jnp.float32),
        seed=jnp.asarray(seeds, jnp.uint32),
    )


def filtered(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution by sorting, one filter after the other."""
    p = np.exp(logits.astype(np.float64) / temperature - np.max(logits / temperature))
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2), (0.8, 12, 0.9, 0.05)],
)
def test_draws_follow_the_filtered_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(5).standard_normal(24).astype(np.float32) * 2
    draws = 20_000
    expected = filtered(logits, temperature, top_k, top_p, min_p)
    tiled = jnp.asarray(np.tile(logits, (draws, 1)))
    ids = np.asarray(sample(tiled, parameters(draws, temperature, top_k, top_p, min_p), jnp.zeros(draws, jnp.int32)))
    counts = np.bincount(ids, minlength=24)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi_square = np.sum((counts[live] - draws * expected[live]) ** 2 / (draws * expected[live]))
    assert chi_square < live.sum() + 5 * np.sqrt(2 * live.sum()) + 5


def test_number_and_seed_change_the_draw_and_nothing_else_does() -> None:
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1000)), jnp.float32)
    one = parameters(1, 1.0)
    first = [int(sample(logits, one, jnp.asarray([n], jnp.int32))[0]) for n in range(20)]
    again = [int(sample(logits, one, jnp.asarray([n], jnp.int32))[0]) for n in range(20)]
    assert first == again
    assert len(set(first)) > 10
    pair = sample(jnp.tile(logits, (2, 1)), parameters(2, 1.0), jnp.asarray([3, 3], jnp.int32))
    assert int(pair[0]) == first[3]
    assert int(pair[1]) != first[3]


def test_temperature_zero_is_greedy_beside_a_warm_slot() -> None:
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((2, 50)), jnp.float32)
    mixed = SamplingParameters(
        temperature=jnp.asarray([0.0, 5.0], jnp.float32),
        top_k=jnp.zeros(2, jnp.int32),
        top_p=jnp.ones(2, jnp.float32),
        min_p=jnp.zeros(2, jnp.float32),
        seed=jnp.zeros((2, 2), jnp.uint32),
    )
    cold = {int(sample(logits, mixed, jnp.asarray([n, n], jnp.int32))[0]) for n in range(20)}
    assert cold == {int(np.argmax(logits[0]))}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-50, 50, width=32, allow_subnormal=False), min_size=1, max_size=40))  # XLA takes them for 0
def test_greedy_is_argmax(values: list[float]) -> None:
    array = np.asarray(values, np.float32)
    assert int(greedy(jnp.asarray(array))) == int(np.argmax(array))
