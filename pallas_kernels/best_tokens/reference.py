"""The largest logits of a row in plain jnp: the largest, then the largest of the rest, and so on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def best_tokens(logits: Float[Array, "rows vocab"], *, count: int) -> Int[Array, "rows count"]:
    """See `api.best_tokens`."""
    rows, vocabulary = jnp.arange(len(logits)), logits.shape[1]
    ids = jnp.arange(vocabulary, dtype=jnp.int32)[None, :]

    def take(left: Array, _: None) -> tuple[Array, Array]:
        # As argmax, in two reductions that vectorise on a CPU.
        top = jnp.max(left, axis=1, keepdims=True)
        token = jnp.minimum(jnp.min(jnp.where(left == top, ids, vocabulary), axis=1), vocabulary - 1)
        return left.at[rows, token].set(-jnp.inf), token

    return jax.lax.scan(take, logits, length=count)[1].T
