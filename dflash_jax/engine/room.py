"""What fits the device's memory beside the weights: how many answers at a time, and with what context.

The engine reserves K and V for all of them when it starts, so that no answer can run out of pages later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from dflash_jax.engine.request import RequestError

_SHARE = 0.9
"""Of the memory beside the weights; programs need the rest while they run."""
_GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Reserved:
    """What an engine reserves: a window of `context_length` tokens for each of `max_sessions` answers."""

    context_length: int
    max_sessions: int


class NoRoom(RequestError):
    """The device's memory does not hold what was asked for."""


def weight_bytes(*networks: nnx.Module | None) -> int:
    """Of all weights; None has none."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(networks) if hasattr(leaf, "nbytes"))


def free_bytes(weights: int) -> int | None:
    """Of the default device, beside `weights` bytes, there already or still to come; None if it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return max(0, int(stats["bytes_limit"]) - max(weights, int(stats.get("bytes_in_use", 0))))


def reserve(
    wanted: Reserved,
    bytes_of: Callable[[int], int],
    free: int | None,
    *,
    beside: Callable[[int], int],
    sessions: bool,
    context: bool,
) -> Reserved:
    """What is wanted, or less of what may be chosen: fewer answers first, then a shorter window.

    `bytes_of` is the need of one answer with a window of so many tokens, `beside` that of everything beside the
    answers. `sessions` and `context` say whether these numbers may be lowered. Raises NoRoom when what is left does not
    fit.
    """
    if free is None:
        return wanted
    usable = int(_SHARE * free)

    def needed(tokens: int, answers: int) -> int:
        return answers * bytes_of(tokens) + beside(tokens)

    fitting = (usable - beside(wanted.context_length)) // bytes_of(wanted.context_length)
    if fitting >= wanted.max_sessions:
        return wanted
    max_sessions = max(1, fitting) if sessions else wanted.max_sessions
    if max_sessions <= fitting:
        return Reserved(wanted.context_length, max_sessions)
    if context and (length := _longest(wanted.context_length, lambda tokens: needed(tokens, max_sessions) <= usable)):
        return Reserved(length, max_sessions)
    gigabytes = needed(wanted.context_length, max_sessions) / _GIGA
    raise NoRoom(
        f"{max_sessions} answers at a time with a context of {wanted.context_length:,} tokens need {gigabytes:.1f} GB; "
        f"{usable / _GIGA:.1f} GB are left by the weights: choose a smaller --context-length or fewer --max-sessions"
    )


def _longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number of tokens up to `most` that fits; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
