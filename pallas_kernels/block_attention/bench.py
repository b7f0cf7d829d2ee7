"""Finds the fastest Config of each kind of shape for tuned.json: `dflash-jax bench kernels --tune` runs it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.block_attention import triton
from pallas_kernels.block_attention.ancestry import STEP_ROWS
from pallas_kernels.cases.attention import LARGE_ATTENTION, AttentionCase
from pallas_kernels.timing import copies_of


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases of one kind of shape, steps and trees: they have one config, or their bits would not be equal."""

    name: str
    cases: tuple[AttentionCase, ...]


def sweep(end: float, file: Path = triton.TUNED) -> Iterator[tuple[Group, dict[str, Any]]]:
    """Tunes each kind of shape by all of its large cases, but for a drafter's, which have a kernel of their own."""
    groups: dict[str, list[AttentionCase]] = {}
    for case in LARGE_ATTENTION:
        if case.causal:
            groups.setdefault(_key(case), []).append(case)
    return tuning.sweep([Group(key, tuple(cases)) for key, cases in groups.items()], tune, end, file)


def tune(group: Group, end: float) -> tuning.Found | None:
    """The key and the config with which all cases together take least, and its figures."""
    made = [case.arguments() for case in group.cases]
    first = made[0][0][0]

    def together(config: triton.Config, first: jax.Array, *arguments: tuple[Any, ...]) -> jax.Array:
        queries = [first, *(each[0] for each in arguments[1:])]
        results = [
            triton.block_attention(query, *rest, **keywords, config=config)
            for query, (_, *rest), (_, keywords) in zip(queries, arguments, made, strict=True)
        ]
        return sum((jnp.mean(result) for result in results), jnp.zeros((), jnp.float32))

    functions = {config: functools.partial(together, config) for config in configs(group.cases[0])}
    size = sum(case.bytes for case in group.cases)
    found = tuning.fastest(functions, first, copies_of([positional for positional, _ in made], size, most=4), end)
    if found is None:
        return None
    config, row = found
    names = [case.name for case in group.cases]
    return group.name, config, {"case": group.name, "cases": names, **row, "bytes": size, "config": vars(config)}


def configs(case: AttentionCase) -> Iterator[triton.Config]:
    """Every config worth a try; the first one is what a device without a sweep takes."""
    lines = _lines(case)
    first = triton.rule(lines, case.head_dim)
    yield first
    programs = (264, 528, 132, 396) if lines <= triton.CHUNK else (264,)
    options = itertools.product((32, 64, 16, 128), (64, 32, 128), (4, 8, 2), (2, 3, 1, 4), programs, (False, True))
    for tile, key_block, warps, stages, count, keys_first in options:
        config = triton.Config(tile, key_block, warps, stages, count, keys_first)
        # Fewer than 64 keys first are no better than lines first, and tiny tiles of a chunk read all keys too often.
        pointless = (keys_first and key_block < 64) or (lines > triton.CHUNK and tile < 32) or tile >= 2 * lines
        if config != first and not pointless and key_block <= case.page_size:
            yield config


def _key(case: AttentionCase) -> str:
    return triton.key(_lines(case), case.key_dim or case.head_dim, case.head_dim)


def _lines(case: AttentionCase) -> int:
    """Of a KV head; a tree is cut as a plain step is."""
    return (STEP_ROWS if case.tree else case.rows) * case.heads // case.kv_heads
