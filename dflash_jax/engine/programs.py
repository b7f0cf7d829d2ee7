"""Everything that is on the device: weights, pools, and the few compiled programs that change them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dflash_jax.compress.prune import select
from dflash_jax.compress.score import (
    QUESTION_ROWS,
    Depth,
    Reading,
    Sparse,
    empty_keys,
    means_of_prefix,
    read_chunk,
    score_tokens,
    sparse_layers,
)
from dflash_jax.engine.extras import extras_of
from dflash_jax.engine.profile import Profile
from dflash_jax.engine.request import Sampling
from dflash_jax.models.decoder import Decoder, empty_pools
from dflash_jax.models.drafter import Drafter, empty_drafter_pools
from dflash_jax.models.layers import KvPool
from dflash_jax.models.ring import Held, Ring
from dflash_jax.speculate.loop import Visit, decode, prefill
from dflash_jax.speculate.pace import PLAIN, StepTimes
from dflash_jax.speculate.sampling import SamplingParameters
from dflash_jax.speculate.step import Networks, Pools, Slots

Step = tuple[str, Callable[[], object]]
_MOST = 2**31 - 1
_DUMMY_STEPS = 4
_LEAST_TEMPERATURE, _LEAST_TOP_P = 1e-4, 1e-6
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
"""What XLA may put into a CUDA graph. The last two are not among its own: with them no loop or branch asks the host."""


def put(value: Any) -> Any:
    """A pytree of arrays on the engine's device, committed to it.

    Programs are compiled anew for arguments that are committed in another way, so everything that enters one passes
    here.
    """
    return jax.device_put(value, jax.devices()[0])


class Tables(NamedTuple):
    """Where the K and V of one sequence are: i32[1, pages_per_sequence] and, where there are rings, i32[1, width]."""

    pages: np.ndarray
    ring: np.ndarray | None = None


class _Weights:
    """A network taken apart for jit: its leaves travel as a flat tuple, which dispatches fastest."""

    def __init__(self, module: nnx.Module | None) -> None:
        self._graph, state = (None, ()) if module is None else nnx.split(module)
        leaves, self._tree = jax.tree.flatten(state)
        self.leaves = tuple(put(leaf) for leaf in leaves)

    def build(self, leaves: Sequence[jax.Array]) -> Any:
        """The network again, inside a traced function; None if there was none."""
        return None if self._graph is None else nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))


class Programs:
    """Device state of one engine and the programs on it. Not thread-safe: one thread owns it.

    `scorer` is None when the target's own first layers score. With a `ring` the target's layers with a window have
    pools of `num_ring_pages` pages; without one they store all tokens. Both numbers of pages count page 0.
    `sparse` says how the scorer reads long prompts.
    """

    def __init__(
        self,
        target: Decoder,
        drafter: Drafter | None,
        scorer: Decoder | None,
        depth: Depth,
        *,
        profile: Profile,
        num_pages: int,
        pages_per_sequence: int,
        ring: Ring | None = None,
        num_ring_pages: int = 1,
        sparse: Sparse | None = None,
    ) -> None:
        self.profile = profile
        self.pages_per_sequence = pages_per_sequence
        self.ring = ring
        self.has_own_scorer = scorer is not None
        self._num_pages, self._num_ring_pages, self._depth = num_pages, num_ring_pages, depth
        self._target_config, self._drafter_config = target.config, drafter.config if drafter else None
        self._scorer_config = scorer.config if scorer else None
        self._scorer_ring = profile.ring(scorer.config, pages_per_sequence) if scorer else None
        longest = drafter.config.block_size if drafter and not profile.tree else profile.block_rows[-1]
        block_rows = {min(rows, longest) for rows in profile.block_rows} if drafter else set()
        self.block_rows = tuple(sorted(block_rows))
        self._weights = (_Weights(target), _Weights(drafter))
        self._scorer_weights = _Weights(scorer if scorer is not None else target)
        page_size = profile.page_size
        self._prefill = self._compile(_prefill, page_size=page_size)
        self._decode = {
            kind: self._compile(
                decode,
                options=_graph_options(),
                draft=kind != PLAIN,
                rows=rows,
                capacity=profile.max_steps * rows,
                page_size=page_size,
                tree=profile.tree,
            )
            for kind, rows in ((PLAIN, profile.plain_rows), *((rows, rows) for rows in self.block_rows))
        }
        config = (scorer or target).config
        fits = sparse is not None and sparse.least_tokens <= pages_per_sequence * page_size
        self._sparse = sparse if fits and sparse_layers(config, depth) else None
        self._read = self._compile_scorer(
            _read_chunk, donated=(1, 2), depth=depth, sparse=self._sparse, page_size=page_size
        )
        self._means = jax.jit(
            functools.partial(
                means_of_prefix,
                config=config,
                depth=depth,
                sparse=self._sparse or Sparse(),
                page_size=page_size,
            )
        )
        self._score = self._compile_scorer(score_tokens, donated=(1,), depth=depth, page_size=page_size)
        self.vocabulary = target.config.vocab_size
        self._no_extras = put(extras_of(Sampling(), np.zeros(0, np.int32), self.vocabulary))
        in_ring = [ring is not None and layer.window is not None for layer in target.config.own_layers]
        self._copy = {
            ring_page: jax.jit(
                functools.partial(_copy_page, in_ring=in_ring, ring_page=ring_page, page_size=page_size),
                donate_argnums=(0,),
            )
            for ring_page in (False, True)
        }
        self.pools: Pools
        self.reset()

    def reset(self) -> None:
        """Empty pools; whatever they held is lost."""
        self._last_chunk: jax.Array | None = None
        self._failed = False
        sizes = {"page_size": self.profile.page_size, "dtype": self.profile.dtype}
        ring_pages = self._num_ring_pages if self.ring else None
        target = empty_pools(self._target_config, num_pages=self._num_pages, num_ring_pages=ring_pages, **sizes)
        config = self._drafter_config
        drafter = empty_drafter_pools(config, num_pages=self._num_pages, **sizes) if config else ()
        self.pools = put(Pools(target, drafter))
        config = self._scorer_config
        own = {"num_pages": self.pages_per_sequence + 1}
        if self._scorer_ring:
            own["num_ring_pages"] = self._scorer_ring.width + 1
        self._scorer_pools = put(empty_pools(config, **own, **sizes)) if config else None

    @property
    def lost(self) -> bool:
        """Whether a program failed after it had taken the pools: only `reset` helps then.

        One that fails while the host does other things leaves pools that hold nothing but its error.
        """
        return self._failed or any(leaf.is_deleted() for leaf in jax.tree.leaves((self.pools, self._scorer_pools)))

    def tables(self, pages: Sequence[int], held: Held, length: int) -> Tables:
        """The tables, padded with page 0, of a sequence with these pages and ring pages whose next row is `length`."""
        return Tables(self._page_table(pages), self.ring.table(held, length) if self.ring else None)

    def whole_tables(self) -> Tables:
        """The tables of a sequence that is alone in the pools."""
        return self._whole(self.ring)

    def scorer_tables(self) -> Tables:
        """The tables of the one sequence in the pools of a scorer of its own."""
        return self._whole(self._scorer_ring)

    def prefill_chunk(self, tokens: np.ndarray, positions: np.ndarray, tables: Tables, start: int) -> None:
        """Stores K and V of as many tokens as one of the profile's chunks has rows at most.

        It returns when the chunk before has been read: the host prepares one while the device reads the other, and what
        somebody else asks of the device waits for two chunks at most.
        """
        tokens, positions = self._pad(tokens), self._pad(positions)
        starts = np.asarray([start], np.int32)
        arguments = (tokens, positions, tables.pages, starts, tables.ring)
        self.pools, mark = self._prefill(self._leaves, self.pools, *arguments)
        self._wait_for_the_chunk_before(mark)

    def decode(self, slots: Slots, sampling: SamplingParameters, rows: int, *, max_steps: int) -> tuple[Visit, Slots]:
        """One visit: the device decodes up to `max_steps` steps; the visit's log-probabilities stay on the device.

        `rows` is one of `block_rows`, or PLAIN for steps without proposals.
        """
        if sampling.extras is None:
            sampling = dataclasses.replace(sampling, extras=self._no_extras)
        visit, self.pools, slots = self._decode[rows](
            self._leaves, self.pools, slots, sampling, np.int32(min(max_steps, self.profile.max_steps))
        )
        host = {name: getattr(visit, name) for name in ("tokens", "count", "steps", "steps_by_count")}
        with self._watched():
            return dataclasses.replace(visit, **jax.device_get(host)), slots

    def begin_reading(self, tables: Tables, start: int, length: int) -> Reading:
        """Buffers for the keys of one prompt of `length` tokens that is being scored.

        The scorer has K and V of its first `start` tokens.
        """
        config, tokens = self._scorer_config or self._target_config, self.profile.scored_tokens(self.pages_per_sequence)
        keys = put(empty_keys(config, self._depth, tokens=tokens, dtype=self.profile.dtype))
        if self._sparse is None or length < self._sparse.least_tokens:
            return Reading(keys, {})
        return Reading(keys, self._means(self._get_scorer_pools(), tables.pages, np.asarray([start], np.int32)))

    def read_for_scoring(
        self,
        reading: Reading,
        tokens: np.ndarray,
        positions: np.ndarray,
        tables: Tables,
        start: int,
        first: int,
        length: int,
    ) -> Reading:
        """The scorer reads one chunk, at token index `start`, of a prompt of `length` tokens.

        The `first` tokens read so far have their keys. It returns when the chunk before has been read.
        """
        rows, starts = (self._pad(tokens), self._pad(positions)), np.asarray([start], np.int32)
        arguments = (*rows, tables.pages, starts, np.int32(first), np.asarray([length], np.int32), tables.ring)
        pools, reading, mark = self._read(self._scorer_weights.leaves, self._get_scorer_pools(), reading, *arguments)
        self._set_scorer_pools(pools)
        self._wait_for_the_chunk_before(mark)
        return reading

    def wait_for_chunks(self) -> None:
        """Returns when all chunks have been read."""
        with self._watched():
            jax.block_until_ready(self._last_chunk)

    def score(
        self, reading: Reading, question: np.ndarray, positions: np.ndarray, tables: Tables, start: int, length: int
    ) -> jax.Array:
        """Scores f32[layers, tokens] of the `length` tokens whose keys are given, under QUESTION_ROWS question tokens.

        The question's own K and V go to token indices `start..`.
        """
        rows, starts = (question[None], positions[None]), np.asarray([start], np.int32)
        arguments = (*rows, tables.pages, starts, np.int32(length), tables.ring)
        scores, pools = self._score(self._scorer_weights.leaves, self._get_scorer_pools(), reading.keys, *arguments)
        self._set_scorer_pools(pools)
        return scores

    def copy_page(self, source: int, destination: int) -> None:
        """Copies one page in every pool under the sessions' page tables."""
        self.pools = self._copy[False](self.pools, np.int32(source), np.int32(destination))

    def copy_ring_page(self, source: int, destination: int) -> None:
        """Copies one page in every pool under the sessions' ring tables."""
        self.pools = self._copy[True](self.pools, np.int32(source), np.int32(destination))

    def warm_up_steps(self, with_scoring: bool) -> list[Step]:
        """Labels and actions that compile every program by running it on page 0."""
        steps: list[Step] = [
            (f"prefill of {rows} tokens", functools.partial(self._run_dummy_prefill, rows))
            for rows in self.profile.chunks
        ]
        for rows in self._decode:
            form = "a tree of " if self.profile.tree else ""
            label = f"decoding with DFlash, {form}{rows} rows" if rows else "plain decoding"
            steps.append((label, functools.partial(self._run_dummy_decode, rows)))
        if with_scoring:
            lengths = {"": 0, "sparse ": self._sparse.least_tokens} if self._sparse else {"": 0}
            steps += [
                (f"{kind}scoring of {rows} tokens", functools.partial(self._run_dummy_read, rows, length))
                for kind, length in lengths.items()
                for rows in self.profile.chunks
            ]
            question = np.zeros(QUESTION_ROWS, np.int32)
            steps.append(("scores", functools.partial(self._run_dummy_score, question)))
        steps.append(("copy of a page", lambda: self.copy_page(0, 0)))
        if self.ring:
            steps.append(("copy of a ring page", lambda: self.copy_ring_page(0, 0)))
        return steps

    def measure_steps(self) -> StepTimes:
        """Seconds of a plain step and of blocks of all sizes on an almost empty context."""
        seconds = {}
        for rows in self._decode:
            samples = []
            for _ in range(3):
                started = time.perf_counter()
                self._run_dummy_decode(rows)
                samples.append(time.perf_counter() - started)
            seconds[rows] = min(samples) / _DUMMY_STEPS
        return StepTimes(plain=seconds.pop(PLAIN), blocks=seconds)

    def _wait_for_the_chunk_before(self, mark: jax.Array) -> None:
        before, self._last_chunk = self._last_chunk, mark
        with self._watched():
            jax.block_until_ready(before)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Around whatever waits for the device, which tells only then that a program has failed."""
        try:
            yield
        except Exception:
            self._failed = True
            raise

    @property
    def _leaves(self) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        return self._weights[0].leaves, self._weights[1].leaves

    def _compile(
        self, function: Callable[..., Any], *, options: dict[str, str] | None = None, **static: Any
    ) -> Callable[..., Any]:
        target, drafter = self._weights

        def program(leaves: Any, pools: Pools, *arguments: Any) -> Any:
            return function(Networks(target.build(leaves[0]), drafter.build(leaves[1])), pools, *arguments, **static)

        program.__name__ = function.__name__.strip("_")
        return jax.jit(program, donate_argnums=(1,), compiler_options=options)

    def _compile_scorer(
        self, function: Callable[..., Any], *, donated: tuple[int, ...], **static: Any
    ) -> Callable[..., Any]:
        weights = self._scorer_weights

        def program(leaves: Any, *arguments: Any) -> Any:
            return function(weights.build(leaves), *arguments, **static)

        program.__name__ = function.__name__.strip("_")
        return jax.jit(program, donate_argnums=donated)

    def _get_scorer_pools(self) -> tuple[KvPool, ...]:
        return self.pools.target if self._scorer_pools is None else self._scorer_pools

    def _set_scorer_pools(self, pools: tuple[KvPool, ...]) -> None:
        if self._scorer_pools is None:
            self.pools = Pools(pools, self.pools.drafter)
        else:
            self._scorer_pools = pools

    def _page_table(self, pages: Sequence[int]) -> np.ndarray:
        table = np.zeros((1, self.pages_per_sequence), np.int32)
        table[0, : len(pages)] = pages
        return table

    def _whole(self, ring: Ring | None) -> Tables:
        return Tables(self._page_table(range(1, self.pages_per_sequence + 1)), ring.whole_table() if ring else None)

    def _no_tables(self) -> Tables:
        return self.tables((), {}, 0)

    def _scoring_tables(self) -> Tables:
        return self.scorer_tables() if self.has_own_scorer else self._no_tables()

    def _pad(self, values: np.ndarray) -> np.ndarray:
        rows = self.profile.chunk_for(len(values))
        return np.pad(values, (0, rows - len(values)))[None].astype(np.int32)

    def _run_dummy_prefill(self, rows: int) -> None:
        zeros = np.zeros(rows, np.int32)
        self.prefill_chunk(zeros, zeros, self._no_tables(), 0)
        jax.block_until_ready(self.pools)

    def _run_dummy_read(self, rows: int, length: int) -> None:
        zeros, tables = np.zeros(rows, np.int32), self._scoring_tables()
        reading = self.begin_reading(tables, 0, length)
        self.read_for_scoring(reading, zeros, zeros, tables, 0, 0, length)
        jax.block_until_ready(self._get_scorer_pools())

    def _run_dummy_score(self, question: np.ndarray) -> None:
        tables = self._scoring_tables()
        scores = self.score(self.begin_reading(tables, 0, 0), question, question, tables, 0, 0)
        select(scores, np.ones(1, np.bool_), 0.5)

    def _run_dummy_decode(self, rows: int) -> None:
        slots = new_slots(self._no_tables(), length=0, position=0, anchor=0, limit=1 << 20, stop_ids=())
        self.decode(slots, sampling_parameters(temperature=0.0), rows, max_steps=_DUMMY_STEPS)


def new_slots(
    tables: Tables, *, length: int, position: int, anchor: int, limit: int, stop_ids: Sequence[int], stops: int = 8
) -> Slots:
    """One slot at the beginning of an answer of at most `limit` tokens."""
    padded = (list(stop_ids) + [-1] * stops)[: max(stops, len(stop_ids))]
    fields = {
        "page_table": tables.pages,
        "ring_table": tables.ring,
        "length": _one(length),
        "position": _one(position),
        "anchor": _one(anchor),
        "number": _one(0),
        "limit": _one(limit),
        "stop_ids": np.asarray([padded], np.int32),
        "live": np.asarray([limit > 0]),
    }
    return Slots(**put(fields))


def sampling_parameters(
    *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> SamplingParameters:
    """The device form of one request's sampling fields. A temperature next to nothing is greedy: logits overflow."""
    temperature = temperature if temperature >= _LEAST_TEMPERATURE else 0.0
    top_p = max(top_p, _LEAST_TOP_P)
    fields = {
        "temperature": _one(temperature, np.float32),
        "top_k": _one(min(top_k, _MOST)),
        "top_p": _one(top_p, np.float32),
        "min_p": _one(min_p, np.float32),
        "seed": np.asarray([[(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF]], np.uint32),
    }
    return SamplingParameters(**put(fields))


def _prefill(networks: Networks, pools: Pools, *arguments: Any, **static: Any) -> tuple[Pools, jax.Array]:
    pools = prefill(networks, pools, *arguments, **static)
    return pools, _mark(pools.target)


def _read_chunk(scorer: Decoder, *arguments: Any, **static: Any) -> tuple[tuple[KvPool, ...], Reading, jax.Array]:
    pools, reading = read_chunk(scorer, *arguments, **static)
    return pools, reading, _mark(reading.keys)


def _mark(arrays: Any) -> jax.Array:
    """A number that is there when the last array is, to wait for when the next program has taken the arrays."""
    last = jax.tree.leaves(arrays)[-1]
    return last[(0,) * last.ndim]


def _graph_options() -> dict[str, str] | None:
    """Compiler options of the loop of decoding steps; whoever sets XLA's flag for CUDA graphs has the last word."""
    name = "xla_gpu_enable_command_buffer"
    on_gpu = jax.default_backend() == "gpu"
    return {name: _GRAPHS} if on_gpu and name not in os.environ.get("XLA_FLAGS", "") else None


def _one(value: float, dtype: Any = np.int32) -> np.ndarray:
    return np.asarray([value], dtype)


def chunks_of(total: int, profile: Profile) -> Iterator[tuple[int, int]]:
    """(start, end) of the prefill passes over `total` tokens."""
    start = 0
    while start < total:
        end = min(total, start + profile.chunk_for(total - start))
        yield start, end
        start = end


def _copy_page(
    pools: Pools,
    source: jax.Array,
    destination: jax.Array,
    *,
    in_ring: Sequence[bool],
    ring_page: bool,
    page_size: int,
) -> Pools:
    """Copies a page in the target's pools that are `in_ring`, or else in the others and the drafter's."""

    def copy(pool: jax.Array) -> jax.Array:
        page = jax.lax.dynamic_slice_in_dim(pool, source * page_size, page_size)
        return jax.lax.dynamic_update_slice_in_dim(pool, page, destination * page_size, axis=0)

    target = [
        jax.tree.map(copy, pool) if ring == ring_page else pool
        for ring, pool in zip(in_ring, pools.target, strict=True)
    ]
    return Pools(tuple(target), pools.drafter if ring_page else jax.tree.map(copy, pools.drafter))
