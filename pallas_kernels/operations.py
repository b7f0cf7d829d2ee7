"""Every operation that has named cases, and what a case costs on the device that is there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention_rows.api import HeadNorms, KvPool, Tables, attention_rows
from pallas_kernels.best_tokens.api import best_tokens
from pallas_kernels.block_attention.api import HOPPER, block_attention
from pallas_kernels.cases import Seed
from pallas_kernels.cases.attention import (
    LARGE_ATTENTION,
    LARGE_SCORING,
    LARGE_SELECTION,
    LARGE_SPARSE,
    SMALL_ATTENTION,
    SMALL_SCORING,
    SMALL_SELECTION,
    SMALL_SPARSE,
)
from pallas_kernels.cases.drafting import (
    LARGE_BEST_TOKENS,
    LARGE_DRAFT_TREE,
    LARGE_MOVE_ROWS,
    SMALL_BEST_TOKENS,
    SMALL_DRAFT_TREE,
    SMALL_MOVE_ROWS,
)
from pallas_kernels.cases.experts import (
    LARGE_EXPERT_CHOICE,
    LARGE_EXPERT_SUM,
    LARGE_GROUPED,
    SMALL_EXPERT_CHOICE,
    SMALL_EXPERT_SUM,
    SMALL_GROUPED,
)
from pallas_kernels.cases.layers import (
    LARGE_ATTENTION_ROWS,
    LARGE_RESIDUAL_NORM,
    SMALL_ATTENTION_ROWS,
    SMALL_RESIDUAL_NORM,
)
from pallas_kernels.cases.matmul import LARGE_MATMUL, SMALL_MATMUL
from pallas_kernels.draft_tree.api import draft_tree
from pallas_kernels.expert_choice.api import choose_experts
from pallas_kernels.expert_sum.api import expert_sum
from pallas_kernels.grouped_matmul.api import HOPPER as HOPPER_GROUPED
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.hopper import on_hopper
from pallas_kernels.move_rows.api import move_rows
from pallas_kernels.quantised_matmul.api import HOPPER as HOPPER_MATMUL
from pallas_kernels.quantised_matmul.api import matmul
from pallas_kernels.residual_norm.api import residual_norm
from pallas_kernels.sparse_attention.api import HOPPER as HOPPER_SPARSE
from pallas_kernels.sparse_attention.api import attend_blocks, select_blocks
from pallas_kernels.timing import copies_of, repeated, seconds_of
from pallas_kernels.token_scoring.api import token_scores

_TOLERANCES = {"bfloat16": 2e-2}
_TOLERANCE = 1e-4
_REPEATS = 10
_REFERENCE_REPEATS = 2
"""XLA's reference takes up to a hundred times as long as the kernel."""


class Case(Protocol):
    """Named arguments of an operation, and the least that any implementation must read and compute for them."""

    @property
    def name(self) -> str:
        """Unique within its operation."""
        ...

    @property
    def dtype(self) -> str:
        """Of the numbers that come in."""
        ...

    @property
    def bytes(self) -> int:
        """That must be read; in operations that write as much as they read, also what must be written."""
        ...

    @property
    def flops(self) -> int:
        """That must be computed; a multiplication and an addition are two."""
        ...

    def arguments(self, seed: Seed = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        ...


class _NoNumbers(np.random.Generator):
    """Arrays of zeros instead of numbers; those of jax, which `jax.eval_shape` makes without memory."""

    def standard_normal(self, size: Any, dtype: Any) -> Any:
        return jnp.zeros(size, dtype)

    def integers(self, low: int, high: int, size: Any, dtype: Any) -> Any:
        return jnp.zeros(size, dtype)

    def uniform(self, low: float, high: float, size: Any) -> Any:
        return jnp.zeros(size, jnp.float32)


def shapes(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A case's arguments with shapes and dtypes instead of arrays: enough to compile with, however large they are."""
    keywords: dict[str, Any] = {}

    def positional() -> tuple[Any, ...]:
        arrays, given = case.arguments(_NoNumbers(np.random.PCG64()))
        keywords.update(given)
        return arrays

    return jax.eval_shape(positional), keywords


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Over the largest value that was expected."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def listed_blocks(*arguments: Any, **keywords: Any) -> jax.Array:
    """What `select_blocks` keeps: numbers of blocks from 1 on, and zeros behind them."""
    indices, counts = select_blocks(*arguments, **keywords)
    listed = jnp.arange(indices.shape[3])[None, None, None, :] < counts[..., None]
    return jnp.where(listed, indices + 1, 0).astype(jnp.float32)


def stream_and_norm(
    parts: jax.Array,
    stream: jax.Array,
    scale: jax.Array,
    post_scale: jax.Array | None,
    factor: jax.Array | None,
    **keywords: Any,
) -> jax.Array:
    """Both results of `residual_norm`, one behind the other."""
    return jnp.stack(residual_norm(parts, stream, scale, post_scale=post_scale, factor=factor, **keywords))


def written_rows(
    parts: jax.Array,
    query_scale: jax.Array | None,
    key_scale: jax.Array | None,
    pool: KvPool | None,
    page_table: jax.Array,
    starts: jax.Array,
    tables: Tables,
    *,
    norm_values: bool,
    eps: float,
    page_size: int,
    **keywords: Any,
) -> jax.Array:
    """All numbers of `attention_rows`' results, one behind the other, but those of page 0, which may be anything."""
    norms = HeadNorms(query_scale, key_scale, norm_values, eps)
    queries, pool = attention_rows(
        parts, pool, page_table, starts, tables, norms=norms, page_size=page_size, **keywords
    )
    return jnp.concatenate([each.reshape(-1) for each in (queries, *(pages[page_size:] for pages in pool or ()))])


def best_ids(*arguments: Any, **keywords: Any) -> jax.Array:
    """What `best_tokens` finds, as numbers that a benchmark can add up."""
    return best_tokens(*arguments, **keywords).astype(jnp.float32)


def weights_and_rows(*arguments: Any, **keywords: Any) -> jax.Array:
    """Weights by expert, which few experts have, beside the normed rows; ten times, to be as large as these."""
    choice = choose_experts(*arguments, **keywords)
    router = arguments[1]
    by_expert = jnp.zeros((len(choice.chosen), len(router)), jnp.float32)
    by_expert = jnp.put_along_axis(by_expert, choice.chosen, 10 * choice.weights, axis=1, inplace=False)
    return jnp.concatenate([by_expert, choice.normed.astype(jnp.float32)], axis=1)


def nodes_of_tree(*arguments: Any, **keywords: Any) -> jax.Array:
    """All numbers of a tree."""
    leaves = jax.tree.leaves(draft_tree(*arguments, **keywords))
    return jnp.stack([leaf.astype(jnp.float32) for leaf in leaves])


def moved_rows(
    first: jax.Array, others: Sequence[jax.Array], *arguments: Any, page_size: int, **keywords: Any
) -> jax.Array:
    """All numbers of the pools, one behind the other, but those of page 0, which may be anything.

    Who keeps the pools, as a measurement does, pays for a copy of them too.
    """
    moved = move_rows([first, *others], *arguments, page_size=page_size, **keywords)
    return jnp.concatenate([pool[page_size:].reshape(-1) for pool in moved])


def differing_share(actual: np.ndarray, expected: np.ndarray) -> float:
    """How many of two lists of ids are not the same."""
    return float((actual != expected).mean())


def differing_blocks(actual: np.ndarray, expected: np.ndarray) -> float:
    """The share of blocks that only one of two lists has; rounding moves a few across the threshold."""

    def kept(listed: np.ndarray) -> np.ndarray:
        mask = np.zeros((*listed.shape[:3], listed.shape[3] + 1), np.bool_)
        np.put_along_axis(mask, listed.astype(np.int64), True, axis=3)
        return mask[..., 1:]

    return float((kept(actual) != kept(expected)).sum() / max(1, kept(expected).sum()))


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation's public name and its cases. `error` compares a result with the reference's.

    `hopper` names its other kernels for Hopper cards, for some cases.
    """

    name: str
    function: Callable[..., jax.Array]
    small: Sequence[Case]
    large: Sequence[Case]
    error: Callable[[np.ndarray, np.ndarray], float] = largest_difference
    hopper: Sequence[str] = ()

    def kernels(self, case: Case) -> tuple[str, ...]:
        """The implementations for an NVIDIA GPU that take a case."""
        positional, keywords = shapes(case)

        def takes(name: str) -> bool:
            try:
                jax.eval_shape(functools.partial(self.function, **keywords, implementation=name), *positional)
            except NotImplementedError:
                return False
            return True

        return ("triton", *filter(takes, self.hopper))


OPERATIONS: tuple[Operation, ...] = (
    Operation("block_attention", block_attention, SMALL_ATTENTION, LARGE_ATTENTION, hopper=HOPPER),
    Operation("token_scoring", token_scores, SMALL_SCORING, LARGE_SCORING),
    Operation("sparse_selection", listed_blocks, SMALL_SELECTION, LARGE_SELECTION, differing_blocks),
    Operation("sparse_attention", attend_blocks, SMALL_SPARSE, LARGE_SPARSE, hopper=HOPPER_SPARSE),
    Operation("quantised_matmul", matmul, SMALL_MATMUL, LARGE_MATMUL, hopper=HOPPER_MATMUL),
    Operation("grouped_matmul", grouped_matmul, SMALL_GROUPED, LARGE_GROUPED, hopper=HOPPER_GROUPED),
    Operation("expert_choice", weights_and_rows, SMALL_EXPERT_CHOICE, LARGE_EXPERT_CHOICE),
    Operation("expert_sum", expert_sum, SMALL_EXPERT_SUM, LARGE_EXPERT_SUM),
    Operation("residual_norm", stream_and_norm, SMALL_RESIDUAL_NORM, LARGE_RESIDUAL_NORM),
    Operation("attention_rows", written_rows, SMALL_ATTENTION_ROWS, LARGE_ATTENTION_ROWS),
    Operation("best_tokens", best_ids, SMALL_BEST_TOKENS, LARGE_BEST_TOKENS, differing_share),
    Operation("draft_tree", nodes_of_tree, SMALL_DRAFT_TREE, LARGE_DRAFT_TREE, differing_share),
    Operation("move_rows", moved_rows, SMALL_MOVE_ROWS, LARGE_MOVE_ROWS),
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device can do at best: bytes and floating-point operations (of bf16) per second."""

    bandwidth: float
    flops: float

    def seconds(self, case: Case) -> float:
        """The floor of a case: no implementation is faster."""
        return max(case.bytes / self.bandwidth, case.flops / self.flops)


def in_f32(arguments: Any) -> Any:
    """The same arguments with every floating-point array in f32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments)


@dataclasses.dataclass(frozen=True)
class Program:
    """One of what a measurement compiles: a function and the shapes of its arguments."""

    function: Callable[..., Any]
    specs: tuple[Any, ...]
    exact: bool = False
    """Whether products of f32 are exact."""

    def trace(self, specs: tuple[Any, ...] | None = None) -> jax.stages.Traced:
        """With its own shapes, or with the same that lie on another device."""
        with jax.default_matmul_precision("highest") if self.exact else contextlib.nullcontext():
            return jax.jit(self.function).trace(*(specs or self.specs))

    def compile(self) -> Callable[..., jax.Array]:
        """For the default device."""
        return self.trace().lower().compile()


def programs(operation: Operation, case: Case, implementation: str | None = None, *, copies: int) -> dict[str, Program]:
    """What a measurement of a case compiles, of which "kernel" is the operation itself."""
    positional, keywords = shapes(case)
    kernel = functools.partial(operation.function, **keywords, implementation=implementation)
    reference = functools.partial(operation.function, **keywords, implementation="reference")
    wide = functools.partial(reference, **({"dtype": "float32"} if "dtype" in keywords else {}))
    first, *rest = positional
    sets = jax.eval_shape(lambda arrays: copies_of(arrays, case.bytes, most=copies), rest)
    return {
        "kernel": Program(kernel, positional),
        "timed kernel": Program(repeated(kernel, _REPEATS), (first, sets)),
        "timed reference": Program(repeated(reference, _REFERENCE_REPEATS), (first, sets)),
        "reference": Program(wide, jax.eval_shape(in_f32, positional), exact=True),
    }


def measure(todo: Sequence[tuple[Operation, Case]], limits: Limits | None) -> Iterator[dict[str, Any]]:
    """Error and time of cases on the default device: of each kernel on a GPU, elsewhere of what the operation picks.

    The error is against the reference in f32 and with exact products. `us_reference` is the reference as XLA compiles
    it. Without limits `floor_us` and `of_floor` (floor over time: 1 is perfect) are None. Compiling takes most of the
    time, and all cores do it, for some cases at a time: on a GPU XLA tries out matmuls meanwhile, which would disturb.
    """
    on_gpu = jax.default_backend() == "gpu"
    copies, workers = (4 if on_gpu else 1), os.cpu_count() or 1

    def compiled(each: tuple[Operation, Case, str | None]) -> dict[str, Callable[..., jax.Array]] | Exception:
        found = programs(*each, copies=copies)
        try:
            return {name: program.compile() for name, program in found.items()}
        except Exception as error:  # what a compiler refuses is a result; the other cases are still to be measured
            return error

    every: list[tuple[Operation, Case, str | None]] = [
        (operation, case, name)
        for operation, case in todo
        for name in (operation.kernels(case) if on_gpu else (None,))
        if name not in operation.hopper or on_hopper()
    ]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(every), 2 * workers):
            batch = every[start : start + 2 * workers]
            for (operation, case, name), runs in zip(batch, list(pool.map(compiled, batch)), strict=True):
                row = {"operation": operation.name, "case": case.name, **({"kernel": name} if name else {})}
                if isinstance(runs, Exception):
                    yield {**row, "error": str(runs).splitlines()[0][:200], "ok": False}
                else:
                    yield {**row, **_measured(operation, case, limits, runs, copies)}


def _measured(
    operation: Operation,
    case: Case,
    limits: Limits | None,
    runs: Mapping[str, Callable[..., jax.Array]],
    copies: int,
) -> dict[str, Any]:
    positional, _ = case.arguments()
    expected = np.asarray(runs["reference"](*in_f32(positional)), np.float32)
    actual = np.asarray(runs["kernel"](*positional), np.float32)
    error, tolerance = operation.error(actual, expected), _TOLERANCES.get(case.dtype, _TOLERANCE)
    first, *rest = positional
    sets = copies_of(rest, case.bytes, most=copies)
    seconds = seconds_of(runs["timed kernel"], first, sets) / _REPEATS / len(sets)
    reference = seconds_of(runs["timed reference"], first, sets) / _REFERENCE_REPEATS / len(sets)
    floor = limits.seconds(case) if limits else None
    return {
        "relative_error": float(f"{error:.3g}"),
        "tolerance": tolerance,
        "us": round(1e6 * seconds, 1),
        "us_reference": round(1e6 * reference, 1),
        "floor_us": round(1e6 * floor, 2) if floor else None,
        "of_floor": round(floor / seconds, 3) if floor else None,
        "ok": bool(np.isfinite(actual).all() and error <= tolerance),
    }
