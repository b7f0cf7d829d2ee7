"""What the controller knows of a session, and what it is told after each turn."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Observed = Array | np.ndarray | np.generic
"""An observation is made on the host: its numbers become arrays of the device when a rule is called."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ControllerState:
    """One session's state; a pytree of scalars, or of arrays when many sessions are simulated at once.

    keep_ratio   share of droppable prompt tokens to keep in the next turn
    ema          running accept length of compressed turns (classic: accepted share of a block), 0 before the first
    expectation  running accept length without compression, or of the first turn when all were compressed; 0 before
    turns        observations that counted
    """

    keep_ratio: Float[Array, "*sessions"]
    ema: Float[Array, "*sessions"]
    expectation: Float[Array, "*sessions"]
    turns: Int[Array, "*sessions"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """One turn: accept length and verify steps (0 when nothing was drafted), degenerate answer?, pruned prompt?"""

    accept_length: Float[Observed, "*sessions"]
    steps: Int[Observed, "*sessions"]
    degenerate: Bool[Observed, "*sessions"]
    compressed: Bool[Observed, "*sessions"]
