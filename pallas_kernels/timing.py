"""Seconds of a call on the device, as benchmarks and the check on a device measure it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_CACHE = 200_000_000
"""Bytes that do not fit into any card's cache."""


def copies_of(arguments: Any, size: int, most: int) -> list[Any]:
    """So many copies of arguments of `size` bytes that no call finds them in the cache from the call before."""
    return [arguments, *(jax.tree.map(jnp.copy, arguments) for _ in range(min(most - 1, _CACHE // max(size, 1))))]


def repeated(function: Callable[..., jax.Array], repeats: int) -> jax.stages.Wrapped:
    """One program of `repeats` rounds of `function(first, *arguments)`, so that dispatch does not count.

    A round goes through the sets of other arguments in turn, and each call waits for the one before. All of a result
    is used: XLA leaves out what nobody reads.
    """

    @jax.jit
    def many(first: jax.Array, sets: Any) -> jax.Array:
        def again(_: int, x: jax.Array) -> jax.Array:
            for arguments in sets:
                x = x + (jnp.mean(function(x, *arguments)) * 1e-30).astype(x.dtype)
            return x

        return jax.lax.fori_loop(0, repeats, again, first)

    return many


def seconds_of(run: Callable[..., jax.Array], *arguments: Any) -> float:
    """Seconds of a program, the best of three; the first run warms up."""
    jax.block_until_ready(run(*arguments))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        best = min(best, time.perf_counter() - started)
    return best
