"""Drawing tokens from the target's own processed distribution.

A token is the one whose logit and Gumbel noise are largest together. The noise depends on the request's seed, on the
token's number in the answer and on its id, never on how many rows were verified at once: with and without DFlash the
same seed gives the same tokens, and a drafter that knows the noise guesses better (path.py). Filters are thresholds
found bit by bit of a float, which needs no sort of the vocabulary.
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
    k, p = parameters.top_k, parameters.top_p
    # These filters read the vocabulary many times; a request without them should not pay for it.
    filtered = jnp.any(warm[:, 0] & ((k > 0) | (p < 1)))
    kept = jax.lax.cond(filtered, lambda: _top_p(_top_k(probabilities, k), p), lambda: probabilities)
    floor = parameters.min_p[:, None] * jnp.max(kept, axis=-1, keepdims=True)
    kept = jnp.where(kept >= floor, kept, 0.0)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(parameters.seed, number, ids)
    drawn = greedy(jnp.where(kept > 0, jnp.log(kept) + noise, -jnp.inf))
    return jnp.where(warm[:, 0], drawn, greedy(logits))


def lifted(
    scores: Float[Array, "slots rows _before ids"],
    ids: Int[Array, "slots rows ids"],
    parameters: SamplingParameters,
    number: Int[Array, " slots"],
) -> Float[Array, "slots rows _before ids"]:
    """Logits of a few tokens with what decides between them when `sample` draws token `number + row`.

    Filters are left out; slots that are greedy keep their logits.
    """
    warm = (parameters.temperature > 0)[:, None, None, None]
    numbers = number[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    noise = jax.vmap(jax.vmap(_gumbel, in_axes=(None, 0, 0)))(parameters.seed, numbers, ids)
    divided = scores / jnp.where(warm, parameters.temperature[:, None, None, None], 1.0)
    return jnp.where(warm, divided + noise[:, :, None, :], scores)


def _gumbel(seed: UInt32[Array, " 2"], number: Int[Array, ""], ids: Int[Array, " ids"]) -> Float[Array, " ids"]:
    """Noise of single tokens: it can be had for a few of them without that of all."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed), number)
    bits = jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids))[:, 0]
    one_to_two = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    uniform = jnp.maximum(one_to_two - 1.0, jnp.finfo(jnp.float32).tiny)
    return -jnp.log(-jnp.log(uniform))


def _top_k(probabilities: Float[Array, "slots vocab"], k: Int[Array, " slots"]) -> Float[Array, "slots vocab"]:
    enough = jnp.where(k > 0, k, probabilities.shape[-1])[:, None]

    def holds(thresholds: Float[Array, "slots some"]) -> Bool[Array, "slots some"]:
        return jnp.sum(probabilities[:, None, :] >= thresholds[:, :, None], axis=-1) >= enough

    return jnp.where(probabilities >= _largest(holds, len(k)), probabilities, 0.0)


def _top_p(probabilities: Float[Array, "slots vocab"], p: Float[Array, " slots"]) -> Float[Array, "slots vocab"]:
    wanted = p[:, None] * jnp.sum(probabilities, axis=-1, keepdims=True)

    def holds(thresholds: Float[Array, "slots some"]) -> Bool[Array, "slots some"]:
        all = probabilities[:, None, :]
        return jnp.sum(jnp.where(all >= thresholds[:, :, None], all, 0.0), axis=-1) >= wanted

    threshold = jnp.where(p[:, None] < 1, _largest(holds, len(p)), 0.0)
    return jnp.where(probabilities >= threshold, probabilities, 0.0)


def _largest(
    holds: Callable[[Float[Array, "slots some"]], Bool[Array, "slots some"]], slots: int
) -> Float[Array, "slots 1"]:
    """The largest float in [0, 1] for which `holds`, which must hold at 0 and not come back once it has failed.

    Positive floats sort as their bits do, of which 30 matter up to 1.0: two are found at a time.
    """
    digits = jnp.arange(1, 4, dtype=jnp.int32)[None, :]
    low = jnp.zeros((slots, 1), jnp.int32)
    for shift in range(28, -1, -2):
        tried = low + (digits << shift)
        good = holds(jax.lax.bitcast_convert_type(tried, jnp.float32)) & (tried <= 0x3F800000)  # the bits of 1.0
        low = low + (jnp.sum(good, axis=1, keepdims=True, dtype=jnp.int32) << shift)
    return jax.lax.bitcast_convert_type(low, jnp.float32)
