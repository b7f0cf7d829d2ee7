"""Thousands of simulated sessions under both controller rules, as the table of docs/controller.md.

    python tools/simulate_controller.py

A session needs some share of its prompt: kept above `needs`, its accept length is its own; below, it falls in
proportion to what is missing, by two thirds at most, as measured on nothing: the simulation shows what a rule does, not
what a model does. Each turn has 4 to 64 verify steps, whose accepted proposals are geometric. The first turn is not
pruned where `first` says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dflash_jax.control.rules import BLOCK_SIZE, BOUNDS, Rule, initial, update
from dflash_jax.control.state import ControllerState, Observation

MOST_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of session: accept length before and after half time, the keep ratio it needs, is the first turn whole?"""

    label: str
    accept_length: tuple[float, float] = (5.0, 5.0)
    needs: tuple[float, float] = (0.02, 0.02)
    first_whole: bool = True


KINDS = (
    Kind("needs almost nothing"),
    Kind("needs 15 %", needs=(0.15, 0.15)),
    Kind("needs 40 %", needs=(0.40, 0.40)),
    Kind("needs 40 %, first turn pruned", needs=(0.40, 0.40), first_whole=False),
    Kind("needs 10 %, then 50 %", needs=(0.10, 0.50)),
    Kind("needs 50 %, then 10 %", needs=(0.50, 0.10)),
    Kind("needs 10 %, harder text from half time", accept_length=(6.0, 3.5), needs=(0.10, 0.10)),
)


def observe(key: Key[Array, ""], accept_length: Float[Array, ""], compressed: Array) -> Observation:
    """One turn's observation: the mean of 4 to 64 block results around the true accept length."""
    count_key, block_key = jax.random.split(key)
    steps = jnp.exp(jax.random.uniform(count_key, minval=jnp.log(4.0), maxval=jnp.log(MOST_STEPS))).astype(jnp.int32)
    # Accepted proposals per block are geometric: each next one is right with probability p, mean 1 / (1 - p).
    accepted = 1 + jnp.log(jax.random.uniform(block_key, (MOST_STEPS,))) // jnp.log1p(-1 / accept_length)
    counted = jnp.arange(MOST_STEPS) < steps
    mean = jnp.sum(jnp.where(counted, jnp.minimum(accepted, BLOCK_SIZE), 0.0)) / steps.astype(jnp.float32)
    return Observation(mean, steps, jnp.bool_(False), compressed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def simulate(rule: Rule, kind: Kind, sessions: int, turns: int) -> tuple[Array, Array]:
    """Keep ratio and share of the session's own accept length, f32[sessions, turns] each, before each turn's update."""

    def turn(state: ControllerState, xs: tuple[Array, Array]) -> tuple[ControllerState, tuple[Array, Array]]:
        number, key = xs
        late = (number >= turns // 2).astype(jnp.int32)
        whole = (number == 0) & kind.first_whole
        kept = jnp.where(whole, 1.0, state.keep_ratio)
        needs = jnp.asarray(kind.needs)[late]
        share = jnp.clip(kept / needs, 1 / 3, 1.0)
        true = jnp.maximum(1.0 + 1e-3, jnp.asarray(kind.accept_length)[late] * share)
        return update(rule, state, observe(key, true, ~whole)), (kept, share)

    def session(key: Key[Array, ""]) -> tuple[Array, Array]:
        return jax.lax.scan(turn, initial(rule), (jnp.arange(turns), jax.random.split(key, turns)))[1]

    return jax.vmap(session)(jax.random.split(jax.random.key(0), sessions))


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description="Simulate sessions under both controller rules.")
    parser.add_argument("--sessions", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=60)
    arguments = parser.parse_args()
    half = arguments.turns // 2
    print(f"{arguments.sessions} sessions of {arguments.turns} turns a row; median (5 % .. 95 %)\n")
    print("| session | rule | kept at half time | kept at the end | accept length, share of its own |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        for rule in get_args(Rule):
            kept, share = simulate(rule, kind, arguments.sessions, arguments.turns)
            low, middle, high = jnp.percentile(kept, jnp.asarray([5.0, 50.0, 95.0]), axis=0)
            cells = [f"{middle[t]:.2f} ({low[t]:.2f} .. {high[t]:.2f})" for t in (half - 1, -1)]
            print(f"| {kind.label} | {rule} | {cells[0]} | {cells[1]} | {share[:, 1:].mean():.2f} |")
    for rule, bounds in BOUNDS.items():
        print(f"\n{rule}: starts at {bounds.start}, stays within {bounds.lowest} .. {bounds.highest}", end="")
    print()


if __name__ == "__main__":
    main()
