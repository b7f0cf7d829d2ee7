"""Drawing tokens from the target's own processed distribution.

A token's noise depends on the request's seed and on the token's number in the answer, never on how many rows were
verified at once: with and without DFlash the same seed gives the same tokens. Filters are thresholds found by bisection
over the bits of a float, which needs no sort of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dflash_jax.speculate.penalties import Penalties


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
    """What few requests ask for: penalties, biases, log-probabilities."""

    asked: Bool[Array, " slots"]
    """Whether the slot asks for any of it."""
    penalties: Penalties


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParameters:
    """Per slot: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off; `seed` is raw key data."""

    temperature: Float[Array, " slots"]
    top_k: Int[Array, " slots"]
    top_p: Float[Array, " slots"]
    min_p: Float[Array, " slots"]
    seed: UInt32[Array, "slots 2"]
    extras: Extras | None = None
    """None: a program without them."""


def greedy(logits: Float[Array, "... vocab"]) -> Int[Array, ...]:
    """The first of the largest logits, i32; as `argmax`, in two reductions that vectorise on a CPU."""
    vocabulary = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(vocabulary, dtype=jnp.int32).reshape((1,) * (logits.ndim - 1) + (vocabulary,))
    return jnp.minimum(jnp.min(jnp.where(logits == top, ids, vocabulary), axis=-1), vocabulary - 1)


def sample(
    logits: Float[Array, "slots vocab"], parameters: SamplingParameters, number: Int[Array, " slots"]
) -> Int[Array, " slots"]:
    """One token per slot; `number` is the index of the token in the slot's answer.

    Filters apply in the order temperature, top-k, top-p, min-p, each to what the previous one left, as in transformers.
    Tokens as likely as the last one that top-k or top-p admits are admitted too.
    """
    warm = parameters.temperature[:, None] > 0
    scaled = logits / jnp.where(warm, parameters.temperature[:, None], 1.0)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    kept = _top_k(probabilities, parameters.top_k)
    kept = _top_p(kept, parameters.top_p)
    floor = parameters.min_p[:, None] * jnp.max(kept, axis=-1, keepdims=True)
    kept = jnp.where(kept >= floor, kept, 0.0)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(parameters.seed, number, logits.shape[-1])
    drawn = greedy(jnp.where(kept > 0, jnp.log(kept) + noise, -jnp.inf))
    return jnp.where(warm[:, 0], drawn, greedy(logits))


def _gumbel(seed: UInt32[Array, " 2"], number: Int[Array, ""], vocabulary: int) -> Float[Array, " vocab"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed), number)
    return jax.random.gumbel(key, (vocabulary,), jnp.float32)


def _top_k(probabilities: Float[Array, "slots vocab"], k: Int[Array, " slots"]) -> Float[Array, "slots vocab"]:
    enough = jnp.where(k > 0, k, probabilities.shape[-1])[:, None]
    threshold = _largest(lambda t: jnp.sum(probabilities >= t, axis=-1, keepdims=True) >= enough, len(k))
    return jnp.where(probabilities >= threshold, probabilities, 0.0)


def _top_p(probabilities: Float[Array, "slots vocab"], p: Float[Array, " slots"]) -> Float[Array, "slots vocab"]:
    total = jnp.sum(probabilities, axis=-1, keepdims=True)

    def reaches(t: Float[Array, "slots 1"]) -> Bool[Array, "slots 1"]:
        return jnp.sum(jnp.where(probabilities >= t, probabilities, 0.0), axis=-1, keepdims=True) >= p[:, None] * total

    threshold = jnp.where(p[:, None] < 1, _largest(reaches, len(p)), 0.0)
    return jnp.where(probabilities >= threshold, probabilities, 0.0)


def _largest(holds: Callable[[Float[Array, "slots 1"]], Bool[Array, "slots 1"]], slots: int) -> Float[Array, "slots 1"]:
    """The largest float in [0, 1] for which `holds`, which must hold at 0 and not come back once it has failed."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        good = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    low = jnp.zeros((slots, 1), jnp.int32)
    high = jnp.full((slots, 1), 0x3F800000, jnp.int32)  # the bits of 1.0; positive floats sort as their bits do
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
