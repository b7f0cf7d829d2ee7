"""The target's own tokens along a tree: from the anchor to the child that equals its token, as long as there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.speculate.draw import Drawn, as_asked, draw_penalised, with_row
from dflash_jax.speculate.logprobs import Logprobs, no_logprobs
from dflash_jax.speculate.penalties import count
from dflash_jax.speculate.sampling import Extras, SamplingParameters, greedy, sample
from pallas_kernels.block_attention.ancestry import bits_of
from pallas_kernels.draft_tree.api import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walked:
    """Where the walk went, and the token that was drawn at each of its rows.

    The first `accepted + 1` entries mean something, in a slot that goes furthest; `path` names their rows in the tree.
    Behind them it names itself, so that rows which are moved along it stay where they are.
    """

    drawn: Drawn
    path: Int[Array, "slots turns"]
    accepted: Int[Array, " slots"]


Counts = Int[Array, "slots vocab"] | None
Choose = Callable[[Array, Array, Counts], tuple[Array, Logprobs | None, Counts]]
"""(turn, row of each slot, counts before it) -> the token, its log-probabilities if asked for, counts after it."""


def walk(
    logits: Float[Array, "slots rows vocab"],
    sampling: SamplingParameters,
    number: Int[Array, " slots"],
    tree: Tree,
    recent: Int[Array, "slots recent"],
    *,
    levels: int,
) -> Walked:
    """Draws at the anchor, goes to the child with that token, draws there; and so on as far as some slot still can.

    `levels` says how deep a node can be. The other arguments are those of `draw`, and so are the tokens: a token's
    noise follows from its number in the answer. One draw decides among all children of a node, so the walk is exact:
    what is drawn does not depend on the tree.
    """
    slots, _, vocabulary = logits.shape
    turns = levels + 1
    nothing = no_logprobs(slots, turns, vocabulary)

    def follow(choose: Choose, counts: Counts = None) -> Walked:
        path = jnp.broadcast_to(jnp.arange(turns, dtype=jnp.int32)[None, :], (slots, turns))
        empty = Walked(Drawn(jnp.zeros((slots, turns), jnp.int32), nothing), path, jnp.zeros(slots, jnp.int32))

        def walking(carry: tuple[Array, Array, Array, Walked, Counts]) -> Array:
            return (carry[0] < turns) & jnp.any(carry[2])

        def step(
            carry: tuple[Array, Array, Array, Walked, Counts],
        ) -> tuple[Array, Array, Array, Walked, Counts]:
            turn, row, goes_on, walked, counts = carry
            token, logprobs, counts = choose(turn, row, counts)
            drawn = dataclasses.replace(walked.drawn, tokens=with_row(walked.drawn.tokens, token[:, None], turn))
            if logprobs is not None:
                joined = jax.tree.map(lambda all, one: with_row(all, one, turn), drawn.logprobs, logprobs)
                drawn = dataclasses.replace(drawn, logprobs=joined)
            child = _child(tree, row, token)
            goes_on &= child > 0
            path = walked.path.at[:, turn + 1].set(jnp.where(goes_on, child, turn + 1), mode="drop")
            accepted = walked.accepted + goes_on.astype(jnp.int32)
            return turn + 1, jnp.where(goes_on, child, row), goes_on, Walked(drawn, path, accepted), counts

        start = (jnp.int32(0), jnp.zeros(slots, jnp.int32), jnp.ones(slots, jnp.bool_), empty, counts)
        return jax.lax.while_loop(walking, step, start)[3]

    def at(row: Array) -> Float[Array, "slots vocab"]:
        return jnp.take_along_axis(logits, row[:, None, None], axis=1)[:, 0]

    def sampled() -> Walked:
        return follow(lambda turn, row, counts: (sample(at(row), sampling, number + turn), None, counts))

    def special(extras: Extras, warm: Array) -> Walked:
        def choose(turn: Array, row: Array, counts: Counts) -> tuple[Array, Logprobs | None, Counts]:
            assert counts is not None
            drawn = draw_penalised(at(row), sampling, extras, number, turn, counts, warm)
            return drawn.tokens[:, 0], drawn.logprobs, count(counts, drawn.tokens)

        return follow(choose, count(extras.penalties.counts, recent))

    def greedily() -> Walked:
        return _walk_at_once(greedy(logits), tree, nothing)

    return as_asked(sampling, greedily, sampled, special)


def _walk_at_once(own: Int[Array, "slots rows"], tree: Tree, nothing: Logprobs) -> Walked:
    """The walk where every row's token is known: to the nodes that agree with their parents' tokens all the way up."""
    row = jnp.arange(own.shape[1], dtype=jnp.int32)[None, :]
    agrees = (jnp.take_along_axis(own, tree.parents, axis=1) == tree.tokens) | (row == 0)
    on_path = (tree.ancestry.sees & ~bits_of(agrees)[:, None]) == 0  # [slots, rows]
    turn = jnp.arange(nothing.ids.shape[1], dtype=jnp.int32)[None, :]
    accepted = jnp.sum(on_path, axis=1, dtype=jnp.int32) - 1
    here = on_path[:, None, :] & (tree.ancestry.depths[:, None, :] == turn[:, :, None])  # [slots, turns, rows]
    path = jnp.sum(jnp.where(here, row[:, None, :], 0), axis=2)
    path = jnp.where(turn <= accepted[:, None], path, turn)
    return Walked(Drawn(jnp.take_along_axis(own, path, axis=1), nothing), path, accepted)


def _child(tree: Tree, row: Int[Array, " slots"], token: Int[Array, " slots"]) -> Int[Array, " slots"]:
    """The row of the child with this token; 0 if there is none."""
    number = jnp.arange(tree.tokens.shape[1], dtype=jnp.int32)[None, :]
    matches = (tree.parents == row[:, None]) & (tree.tokens == token[:, None])
    return jnp.max(jnp.where(matches, number, 0), axis=1)
