"""One step of decoding: the drafter proposes a block, the target verifies it, the longest right prefix is committed.

Plain decoding is the same step with proposals that no token equals. The step is pure and works on all slots at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dflash_jax.models.decoder import Decoder, Place
from dflash_jax.models.drafter import Drafter, PathSelector, block_tokens
from dflash_jax.models.layers import KvPool
from dflash_jax.speculate.draw import draw
from dflash_jax.speculate.logprobs import Logprobs
from dflash_jax.speculate.path import choose_path
from dflash_jax.speculate.sampling import SamplingParameters
from dflash_jax.speculate.tree import choose_tree
from dflash_jax.speculate.walk import walk
from pallas_kernels.draft_tree.api import Tree
from pallas_kernels.move_rows.api import move_rows


@dataclasses.dataclass(frozen=True)
class Networks:
    """The target and, if there is one, its drafter."""

    target: Decoder
    drafter: Drafter | None

    @property
    def captured_layers(self) -> Sequence[int]:
        """Target layers whose features the drafter reads."""
        return self.drafter.config.target_layers if self.drafter else ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pools:
    """KV pools of the target and of the drafter (none without a drafter), under the same page tables."""

    target: tuple[KvPool, ...]
    drafter: tuple[KvPool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where each sequence stands. A slot that is not live computes rows that nobody reads."""

    page_table: Int[Array, "slots pages"]
    length: Int[Array, " slots"]
    """Tokens whose K and V are in the pools; the anchor is the next one."""
    position: Int[Array, " slots"]
    """RoPE position of the anchor: `length` unless a pruned prompt kept its original positions."""
    anchor: Int[Array, " slots"]
    number: Int[Array, " slots"]
    """Tokens of the answer so far."""
    limit: Int[Array, " slots"]
    """Tokens that the answer may have."""
    stop_ids: Int[Array, "slots stops"]
    """Padded with -1."""
    live: Bool[Array, " slots"]
    ring_table: Int[Array, "slots ring_pages"] | None = None


@dataclasses.dataclass(frozen=True)
class Committed:
    """What a step adds to each slot: the first `count` of `tokens`, the last of them the new anchor."""

    tokens: Int[Array, "slots rows"]
    logprobs: Logprobs
    count: Int[Array, " slots"]


def no_proposals(slots: Slots, rows: int) -> Int[Array, "slots proposals"]:
    """Proposals for a plain step of `rows` rows: no token equals them."""
    return jnp.full((slots.anchor.shape[0], rows - 1), -1, jnp.int32)


def propose(
    networks: Networks, pools: Pools, slots: Slots, sampling: SamplingParameters, *, rows: int, page_size: int
) -> tuple[Int[Array, "slots proposals"], Pools]:
    """The tokens that the drafter expects the target to choose for each of the `rows - 1` rows after the anchor."""
    hidden, selector, pools = _draft(networks, pools, slots, rows, page_size)
    return choose_path(networks.target, selector, hidden, slots.anchor, sampling, slots.number), pools


def propose_tree(
    networks: Networks,
    pools: Pools,
    slots: Slots,
    sampling: SamplingParameters,
    *,
    levels: int,
    rows: int,
    page_size: int,
) -> tuple[Tree, Pools]:
    """A tree of `rows` rows: the likeliest paths through the `levels` rows after the anchor."""
    hidden, selector, pools = _draft(networks, pools, slots, levels + 1, page_size)
    return choose_tree(networks.target, selector, hidden, slots.anchor, sampling, slots.number, rows=rows), pools


def verify(
    networks: Networks,
    pools: Pools,
    slots: Slots,
    sampling: SamplingParameters,
    proposals: Int[Array, "slots proposals"],
    recent: Int[Array, "slots recent"],
    *,
    page_size: int,
) -> tuple[Committed, Pools, Slots]:
    """Runs the target over anchor and proposals and commits what it agrees with, plus one token of its own.

    At each row the target draws its own token; a proposal is accepted if it equals that token and all before it were
    accepted (lossless for any drafter: each committed token is the target's own draw given the true prefix). A proposal
    may be any number. `recent` is what this visit has committed so far, -1 for nothing.
    """
    rows = proposals.shape[1] + 1
    place = dataclasses.replace(_place(slots, rows, page_size), source=_source(slots, proposals))
    block = jnp.concatenate([slots.anchor[:, None], jnp.maximum(proposals, 0)], axis=1)
    passed = networks.target(block, pools.target, place, capture=networks.captured_layers)
    drafter_pools = pools.drafter
    if networks.drafter is not None and passed.features is not None:
        drafter_pools = networks.drafter.read(passed.features, pools.drafter, place)
    own = draw(networks.target.logits(passed.hidden), sampling, slots.number, proposals, recent)
    agreeing = jnp.cumprod((own.tokens[:, :-1] == proposals).astype(jnp.int32), axis=1)
    committed = Committed(own.tokens, own.logprobs, _count(own.tokens, jnp.sum(agreeing, axis=1), slots))
    return committed, Pools(passed.pools, drafter_pools), _advance(slots, committed)


def verify_tree(
    networks: Networks,
    pools: Pools,
    slots: Slots,
    sampling: SamplingParameters,
    tree: Tree,
    recent: Int[Array, "slots recent"],
    *,
    levels: int,
    page_size: int,
) -> tuple[Committed, Pools, Slots]:
    """As `verify`, with a tree whose nodes are at most `levels` deep in place of a chain.

    K and V of the accepted rows move to the front of the block, where a chain would have left them. They fit there:
    RoPE has turned them by their depth. The drafter reads these rows' features only.
    """
    target = networks.target
    positions = slots.position[:, None] + tree.ancestry.depths
    source = _source(slots, tree.tokens[:, 1:])
    where = (slots.page_table, slots.length, positions, page_size, slots.ring_table)
    place = Place(*where, tree=tree.ancestry, source=source)
    passed = target(jnp.maximum(tree.tokens, 0), pools.target, place, capture=networks.captured_layers)
    own = walk(target.logits(passed.hidden), sampling, slots.number, tree, recent, levels=levels)
    drafter_pools = pools.drafter
    if networks.drafter is not None and passed.features is not None:
        features = jnp.take_along_axis(passed.features, own.path[:, :, None], axis=1)
        drafter_pools = networks.drafter.read(features, pools.drafter, _place(slots, levels + 1, page_size))
    drawn = own.drawn
    committed = Committed(drawn.tokens, drawn.logprobs, _count(drawn.tokens, own.accepted, slots))
    return committed, Pools(_moved(target, passed.pools, own.path, place), drafter_pools), _advance(slots, committed)


def _draft(
    networks: Networks, pools: Pools, slots: Slots, rows: int, page_size: int
) -> tuple[Float[Array, "slots proposals dim"], PathSelector | None, Pools]:
    """The drafter's hidden states of the `rows - 1` rows after the anchor, and what selects paths through them."""
    drafter = networks.drafter
    if drafter is None:
        raise ValueError("proposals need a drafter")
    block = block_tokens(slots.anchor, drafter.config, rows)
    place = _place(slots, block.shape[1], page_size)
    hidden, drafter_pools = drafter(networks.target.embed(block), pools.drafter, place)
    selector = drafter.path if drafter.config.path_rank else None
    return hidden[:, 1:rows], selector, dataclasses.replace(pools, drafter=drafter_pools)


def _moved(
    target: Decoder, pools: Sequence[KvPool], path: Int[Array, "slots turns"], place: Place
) -> tuple[KvPool, ...]:
    """The pools with the rows of the path at the front of the block, by table: those of a ring, and the others."""
    moved = dict(enumerate(pools))
    tables = [place.table(layer) for layer in target.config.own_layers]
    for ring in sorted({ring for _, ring in tables}):
        layers = [index for index, (_, in_ring) in enumerate(tables) if in_ring == ring]
        arrays = [array for index in layers for array in pools[index]]
        table = tables[layers[0]][0]
        arrays = move_rows(arrays, path, table, place.starts, page_size=place.page_size, ring=ring)
        moved.update(zip(layers, zip(arrays[::2], arrays[1::2], strict=True), strict=True))
    return tuple(moved[index] for index in range(len(pools)))


def _place(slots: Slots, rows: int, page_size: int) -> Place:
    positions = slots.position[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]
    return Place(slots.page_table, slots.length, positions, page_size, slots.ring_table)


def _source(slots: Slots, proposals: Int[Array, "slots proposals"]) -> Int[Array, " all_rows"]:
    """Of all rows, themselves; for those that cannot be committed, the first that can."""
    anchor = jnp.ones((len(proposals), 1), jnp.bool_)
    read = (jnp.concatenate([anchor, proposals >= 0], axis=1) & slots.live[:, None]).reshape(-1)
    return jnp.where(read, jnp.arange(read.size, dtype=jnp.int32), jnp.argmax(read).astype(jnp.int32))


def _count(own: Int[Array, "slots rows"], accepted: Int[Array, " slots"], slots: Slots) -> Int[Array, " slots"]:
    """How many of the target's own tokens are committed, given how many proposals it accepted."""
    count = accepted + 1
    stops = jnp.any(own[:, :, None] == slots.stop_ids[:, None, :], axis=-1)  # [slots, rows]
    before_stop = jnp.cumprod(1 - stops.astype(jnp.int32), axis=1)
    count = jnp.minimum(count, jnp.sum(before_stop, axis=1) + 1)
    count = jnp.minimum(count, slots.limit - slots.number)
    return jnp.where(slots.live, count, 0)


def _advance(slots: Slots, committed: Committed) -> Slots:
    last = jnp.maximum(committed.count - 1, 0)[:, None]
    anchor = jnp.where(slots.live, jnp.take_along_axis(committed.tokens, last, axis=1)[:, 0], slots.anchor)
    number = slots.number + committed.count
    stopped = jnp.any(anchor[:, None] == slots.stop_ids, axis=-1)
    return dataclasses.replace(
        slots,
        length=slots.length + committed.count,
        position=slots.position + committed.count,
        anchor=anchor,
        number=number,
        live=slots.live & ~stopped & (number < slots.limit),
    )
