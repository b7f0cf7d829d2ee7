"""References as engines run them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def one_program(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """A function as one program, of which keyword arguments are constants.

    Called as it stands, each of its small steps would be compiled by itself, which takes several times as long.
    """

    def call(*positional: Any, **keywords: Any) -> Any:
        return jax.jit(functools.partial(function, **fixed, **keywords))(*positional)

    return call
