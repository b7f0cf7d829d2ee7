"""The target writes the conversations that its drafter learns from, many at a time, on all devices.

Every slot writes one conversation: it completes the user's question (unless that is given), answers it, and may go on
for another round. The device takes steps of one token for all slots; tokens that are given (template, prompts) enter
through the same steps. Between visits the host gives finished slots their next turn, or a new conversation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from dflash_jax.engine.request import RequestError
from dflash_jax.models.decoder import Decoder, Place, empty_pools
from dflash_jax.models.layers import KvPool
from dflash_jax.speculate.sampling import greedy
from dflash_jax.train.learner import DATA, data_mesh
from dflash_jax.train.openings import Joints, Opening
from dflash_jax.train.samples import Samples

_PAGE_SIZE = 128
_VISIT = 32
"""Steps between two looks of the host."""
_QUESTION_TOKENS = 160
_LEAST_QUESTION, _LEAST_ANSWER = 3, 8
_LOOP_TOKENS = 96
"""An answer that ends in the same few tokens over and over for so long is in a loop."""
_ANOTHER_ROUND = 0.3
"""Chance that a conversation goes on after an answer."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How conversations are drawn: the temperature of questions, and of answers with their shares."""

    question: float = 0.8
    answers: tuple[tuple[float, float], ...] = ((0.0, 0.75), (0.7, 0.2), (1.0, 0.05))
    answer_tokens: int = 512


@dataclasses.dataclass(frozen=True)
class Written:
    """Conversations, how long they took, and openings that had to be skipped."""

    samples: Samples
    tokens_per_second: float
    skipped: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """State of all slots, on the device during a visit and in numpy between visits.

    tokens       i32[slots, room]
    length       i32[slots]: how many of them are in the pools
    given        i32[slots]: how many are known; what follows is drawn
    end          i32[slots]: where a turn must end
    temperature  f32[slots]
    live         bool[slots]
    """

    tokens: Any
    length: Any
    given: Any
    end: Any
    temperature: Any
    live: Any


@dataclasses.dataclass
class _Conversation:
    """Host state of one slot: which turn it is in, and where its answers stand."""

    answering: bool = False
    turn_start: int = 0
    answers: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class Writer:
    """Writes conversations of up to `room` tokens with one target, `slots` at a time."""

    def __init__(
        self, target: Decoder, joints: Joints, *, slots: int, room: int, style: Style | None = None, seed: int = 0
    ) -> None:
        self._graph, self._weights = nnx.split(target)
        self._stops = frozenset(target.config.stop_ids)
        self._joints, self._style = joints, style or Style()
        self._room = -(-room // _PAGE_SIZE) * _PAGE_SIZE
        self._generator = np.random.default_rng(seed)
        self._key = jax.random.key(seed)
        mesh = data_mesh()
        slots = -(-slots // mesh.size) * mesh.size
        everywhere, spread = PartitionSpec(), PartitionSpec(DATA)
        self._weights = jax.device_put(self._weights, NamedSharding(mesh, everywhere))
        pages, mine = self._room // _PAGE_SIZE, slots // mesh.size
        sizes = {"num_pages": 1 + mine * pages, "page_size": _PAGE_SIZE, "dtype": target.dtype}
        new_pools = jax.shard_map(lambda: empty_pools(target.config, **sizes), mesh=mesh, in_specs=(), out_specs=spread)
        self._pools = jax.jit(new_pools)()
        self._table = 1 + jnp.arange(mine * pages, dtype=jnp.int32).reshape(mine, pages)
        run = jax.shard_map(
            self._run,
            mesh=mesh,
            in_specs=(everywhere, spread, spread, everywhere),
            out_specs=(spread, spread),
            check_vma=False,
        )
        self._visit = jax.jit(run, donate_argnums=(1,))
        self._rows = _Rows(
            tokens=np.zeros((slots, self._room), np.int32),
            length=np.zeros(slots, np.int32),
            given=np.ones(slots, np.int32),
            end=np.full(slots, self._room, np.int32),
            temperature=np.zeros(slots, np.float32),
            live=np.zeros(slots, np.bool_),
        )
        self._conversations: list[_Conversation | None] = [None] * slots

    def write(
        self,
        openings: Iterator[tuple[Opening, np.ndarray]],
        *,
        tokens: int,
        seconds: float | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Written:
        """At least `tokens` tokens of conversations, or as many as `seconds` allow, of openings and their ids.

        Raises RequestError when no opening leaves room for an answer.
        """
        finished: list[tuple[np.ndarray, np.ndarray]] = []
        written, skipped, started = 0, 0, time.monotonic()
        while written < tokens and (seconds is None or time.monotonic() - started < seconds):
            for slot in np.flatnonzero(~self._rows.live):
                done = self._finish_turn(int(slot))
                if done is not None:
                    finished.append(done)
                    written += len(done[0])
                if self._conversations[slot] is None:
                    skipped += self._begin(int(slot), openings)
            progress(min(written, tokens))
            self._key, key = jax.random.split(self._key)
            rows, self._pools = self._visit(self._weights, self._pools, self._rows, key)
            self._rows = jax.tree.map(np.array, rows)
            self._rows.live[self._looping()] = False
        rate = written / max(time.monotonic() - started, 1e-9)
        return Written(Samples.of(finished), rate, skipped)

    def _looping(self) -> np.ndarray:
        """Slots whose answer repeats itself: more of it would teach nothing."""
        rows = self._rows
        written = rows.length + 1 - rows.given
        at = np.maximum(rows.length[:, None] - np.arange(_LOOP_TOKENS)[None, ::-1], 0)
        tails = np.take_along_axis(rows.tokens, at, axis=1)
        periods = range(1, _LOOP_TOKENS // 4 + 1)
        loops = np.stack([(tails[:, period:] == tails[:, :-period]).all(axis=1) for period in periods]).any(axis=0)
        return rows.live & loops & (written >= _LOOP_TOKENS)

    def _run(
        self, weights: nnx.State, pools: tuple[KvPool, ...], rows: _Rows, key: PRNGKeyArray
    ) -> tuple[_Rows, tuple[KvPool, ...]]:
        target = nnx.merge(self._graph, weights)
        key = jax.random.fold_in(key, jax.lax.axis_index(DATA))
        stops = jnp.asarray(sorted(self._stops), jnp.int32)

        def step(number: Array, carry: tuple[_Rows, tuple[KvPool, ...]]) -> tuple[_Rows, tuple[KvPool, ...]]:
            rows, pools = carry
            slot = jnp.arange(len(rows.length))
            entering = rows.tokens[slot, rows.length]
            place = Place(self._table, rows.length, rows.length[:, None], _PAGE_SIZE)
            passed = target(entering[:, None], pools, place)
            drawn = _draw(target.logits(passed.hidden[:, 0]), rows.temperature, jax.random.fold_in(key, number))
            after = jnp.minimum(rows.length + 1, rows.tokens.shape[1] - 1)
            known = after < rows.given
            token = jnp.where(known | ~rows.live, rows.tokens[slot, after], drawn)
            ends = ~known & (jnp.any(token[:, None] == stops[None, :], axis=1) | (after + 1 >= rows.end))
            moved = dataclasses.replace(
                rows,
                tokens=rows.tokens.at[slot, after].set(token),
                length=jnp.where(rows.live, after, rows.length),
                live=rows.live & ~ends,
            )
            return moved, passed.pools

        return jax.lax.fori_loop(0, _VISIT, step, (rows, pools))

    def _begin(self, slot: int, openings: Iterator[tuple[Opening, np.ndarray]]) -> int:
        """Gives a slot a new conversation; how many openings were too long for one."""
        for skipped, (opening, ids) in enumerate(openings):
            if len(ids) + len(self._joints.to_answer) + _LEAST_ANSWER < self._room // 2 and len(ids):
                self._conversations[slot] = _Conversation()
                self._rows.length[slot] = 0
                self._ask(slot, 0, ids)
                if opening.whole:
                    self._turn_to_answer(slot, len(ids))
                return skipped
            if skipped > 1000:
                break
        raise RequestError("the prompts leave no room for an answer: all are too long, or there are none")

    def _finish_turn(self, slot: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Moves a slot on to its next turn; its whole conversation if there is none."""
        conversation = self._conversations[slot]
        if conversation is None:
            return None
        known = int(self._rows.length[slot]) + 1
        stopped = int(self._rows.tokens[slot, known - 1]) in self._stops
        words = known - conversation.turn_start - stopped
        room_left = self._room - known
        if conversation.answering:
            if words >= _LEAST_ANSWER or stopped:
                conversation.answers.append((conversation.turn_start, known))
            goes_on = stopped and room_left > self._room // 3 and self._generator.random() < _ANOTHER_ROUND
            if goes_on:
                self._ask(slot, known - stopped, self._joints.to_user)
                return None
        elif words >= _LEAST_QUESTION and room_left > len(self._joints.to_answer) + _LEAST_ANSWER:
            self._turn_to_answer(slot, known - stopped)
            return None
        self._conversations[slot] = None
        if not conversation.answers:
            return None
        answers = np.zeros(known, np.bool_)
        for start, end in conversation.answers:
            answers[start:end] = True
        end = conversation.answers[-1][1]
        return self._rows.tokens[slot, :end].copy(), answers[:end]

    def _ask(self, slot: int, end: int, given: np.ndarray) -> None:
        """A turn of the user: what is given of it stands from `end` on, the target adds the rest."""
        self._give(slot, end, given, _QUESTION_TOKENS, self._style.question)

    def _turn_to_answer(self, slot: int, end: int) -> None:
        temperatures, shares = zip(*self._style.answers, strict=True)
        temperature = self._generator.choice(temperatures, p=np.asarray(shares) / sum(shares))
        self._give(slot, end, self._joints.to_answer, self._style.answer_tokens, float(temperature))
        self._conversations[slot].answering = True  # pyright: ignore[reportOptionalMemberAccess]

    def _give(self, slot: int, end: int, ids: np.ndarray, tokens: int, temperature: float) -> None:
        """Puts ids at `end`, behind which the target may write so many tokens."""
        rows, conversation, given = self._rows, self._conversations[slot], end + len(ids)
        rows.tokens[slot, end:given] = ids
        rows.given[slot], rows.end[slot] = given, min(given + tokens, self._room)
        rows.temperature[slot], rows.live[slot] = temperature, True
        if conversation is not None:
            conversation.answering, conversation.turn_start = False, given


def _draw(logits: Float[Array, "slots vocab"], temperature: Float[Array, " slots"], key: PRNGKeyArray) -> Array:
    warm = temperature[:, None] > 0
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return greedy(jnp.where(warm, logits / jnp.where(warm, temperature[:, None], 1.0) + noise, logits))
