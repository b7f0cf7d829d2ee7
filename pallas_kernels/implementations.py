"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Sequence

import jax


def choose(
    operation: str, asked: str | None, *, triton_fits: bool, known: Sequence[str] = ("reference", "triton")
) -> str:
    """The implementation that was asked for; without a name, triton on a GPU for what it takes, else reference.

    Raises NotImplementedError for a name that the operation does not know.
    """
    if asked not in (None, *known):
        raise NotImplementedError(f"{operation} has no implementation {asked!r}: use one of {tuple(known)}")
    return asked or ("triton" if triton_fits and jax.default_backend() == "gpu" else "reference")
