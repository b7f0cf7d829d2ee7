"""The compiled programs that change the pools: prefill of a chunk, and the device loop of decoding steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dflash_jax.models.decoder import Place
from dflash_jax.speculate.logprobs import Logprobs, no_logprobs
from dflash_jax.speculate.sampling import SamplingParameters
from dflash_jax.speculate.step import (
    Committed,
    Networks,
    Pools,
    Slots,
    no_proposals,
    propose,
    propose_tree,
    verify,
    verify_tree,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visit:
    """What the device did between two looks of the host: per slot the committed tokens, and how many steps were run."""

    tokens: Int[Array, "slots capacity"]
    """-1 after the last one."""
    logprobs: Logprobs
    """Zeros unless a slot asked for something special."""
    count: Int[Array, " slots"]
    steps: Int[Array, ""]
    steps_by_count: Int[Array, "slots counts"]
    """Entry c: how many steps committed c tokens."""


def prefill(
    networks: Networks,
    pools: Pools,
    tokens: Int[Array, "slots rows"],
    positions: Int[Array, "slots rows"],
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    ring_table: Int[Array, "slots ring_pages"] | None = None,
    *,
    page_size: int,
) -> Pools:
    """Stores K and V of one chunk of prompt tokens, in the target's pools and, from its features, in the drafter's.

    Rows past the end of a prompt may hold any token: what they store is overwritten before it is read.
    """
    place = Place(page_table, starts, positions, page_size, ring_table)
    passed = networks.target(tokens, pools.target, place, capture=networks.captured_layers)
    if networks.drafter is None or passed.features is None:
        return dataclasses.replace(pools, target=passed.pools)
    return Pools(passed.pools, networks.drafter.read(passed.features, pools.drafter, place))


def decode(
    networks: Networks,
    pools: Pools,
    slots: Slots,
    sampling: SamplingParameters,
    max_steps: Int[Array, ""],
    *,
    draft: bool,
    rows: int,
    capacity: int,
    page_size: int,
    tree: bool = False,
) -> tuple[Visit, Pools, Slots]:
    """Steps until no slot is live or `max_steps` are done, without the host.

    `capacity` bounds the committed tokens of a visit; it must be at least `rows`. With `draft` each step verifies a
    block from the drafter, without it the step commits one token. The `rows` of a block are a chain or a `tree`.
    """

    def room(carry: tuple[Visit, Pools, Slots]) -> Array:
        visit, _, slots = carry
        return jnp.any(slots.live) & (visit.steps < max_steps) & (jnp.max(visit.count) + rows <= capacity)

    def chain_step(pools: Pools, slots: Slots, recent: Array) -> tuple[Committed, Pools, Slots]:
        if draft:
            proposals, pools = propose(networks, pools, slots, sampling, rows=rows, page_size=page_size)
        else:
            proposals = no_proposals(slots, rows)
        return verify(networks, pools, slots, sampling, proposals, recent, page_size=page_size)

    def tree_step(pools: Pools, slots: Slots, recent: Array) -> tuple[Committed, Pools, Slots]:
        assert networks.drafter is not None
        sizes = {"levels": min(rows, networks.drafter.config.block_size) - 1, "page_size": page_size}
        nodes, pools = propose_tree(networks, pools, slots, sampling, rows=rows, **sizes)
        return verify_tree(networks, pools, slots, sampling, nodes, recent, **sizes)

    def step(carry: tuple[Visit, Pools, Slots]) -> tuple[Visit, Pools, Slots]:
        visit, pools, slots = carry
        if draft and tree:
            committed, pools, slots = tree_step(pools, slots, visit.tokens)
        else:
            committed, pools, slots = chain_step(pools, slots, visit.tokens)
        row = jnp.arange(committed.tokens.shape[1], dtype=jnp.int32)[None, :]
        target = jnp.where(row < committed.count[:, None], visit.count[:, None] + row, capacity)
        slot = jnp.arange(len(visit.count), dtype=jnp.int32)[:, None]

        def append(before: Array, new: Array) -> Array:
            return before.at[slot, target].set(new, mode="drop")

        tokens = append(visit.tokens, committed.tokens)
        logprobs = jax.tree.map(append, visit.logprobs, committed.logprobs)
        seen = visit.steps_by_count.at[slot[:, 0], committed.count].add(1)
        return Visit(tokens, logprobs, visit.count + committed.count, visit.steps + 1, seen), pools, slots

    num_slots = slots.anchor.shape[0]
    empty = Visit(
        tokens=jnp.full((num_slots, capacity), -1, jnp.int32),
        logprobs=no_logprobs(num_slots, capacity, networks.target.config.vocab_size),
        count=jnp.zeros(num_slots, jnp.int32),
        steps=jnp.int32(0),
        steps_by_count=jnp.zeros((num_slots, rows + 1), jnp.int32),
    )
    return jax.lax.while_loop(room, step, (empty, pools, slots))
