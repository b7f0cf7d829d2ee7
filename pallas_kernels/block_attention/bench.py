"""Finds the fastest Config of each kind of shape for tuned.json: `dflash-jax bench kernels --tune` runs it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.block_attention import triton
from pallas_kernels.cases.attention import LARGE_ATTENTION, AttentionCase
from pallas_kernels.timing import copies_of


def sweep(end: float, file: Path = triton.TUNED) -> Iterator[tuple[AttentionCase, dict[str, Any]]]:
    """Tunes one large case of each kind of shape, the first one that there is."""
    cases = {_key(case): case for case in reversed(LARGE_ATTENTION)}
    return tuning.sweep(list(cases.values()), tune, end, file)


def tune(case: AttentionCase, end: float) -> tuning.Found | None:
    """The key and the fastest config of a case, and its figures."""
    (queries, *rest), keywords = case.arguments()
    functions = {
        config: functools.partial(triton.block_attention, **keywords, config=config) for config in configs(case)
    }
    found = tuning.fastest(functions, queries, copies_of(rest, case.bytes, most=4), end)
    if found is None:
        return None
    config, row = found
    row = {"case": case.name, **row, "bytes": case.bytes, "config": vars(config)}
    return _key(case), config, row


def configs(case: AttentionCase) -> Iterator[triton.Config]:
    """Every config worth a try; the first one is what a device without a sweep takes."""
    lines = _lines(case)
    first = triton.rule(lines, case.head_dim)
    yield first
    programs = (264, 528, 132) if lines <= triton.CHUNK else (264,)
    options = itertools.product((32, 64, 16, 128), (64, 32, 128), (4, 8), (2, 3, 1), programs, (False, True))
    for tile, key_block, warps, stages, count, keys_first in options:
        config = triton.Config(tile, key_block, warps, stages, count, keys_first)
        # Fewer than 64 keys first are no better than lines first, and tiny tiles of a chunk read all keys too often.
        pointless = (keys_first and key_block < 64) or (lines > triton.CHUNK and tile < 32) or tile >= 2 * lines
        if config != first and not pointless and key_block <= case.page_size:
            yield config


def _key(case: AttentionCase) -> str:
    return triton.key(_lines(case), case.key_dim or case.head_dim, case.head_dim)


def _lines(case: AttentionCase) -> int:
    return case.rows * case.heads // case.kv_heads
