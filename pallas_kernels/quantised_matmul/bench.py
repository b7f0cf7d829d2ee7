"""Finds the fastest Config of each case on this device for tuned.json: `dflash-jax bench kernels --tune` runs it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.cases.matmul import LARGE_MATMUL, MatmulCase
from pallas_kernels.quantised_matmul import triton
from pallas_kernels.quantised_matmul.weights import BLOCK, W4, W8, Weight
from pallas_kernels.timing import copies_of


def sweep(end: float, file: Path = triton.TUNED) -> Iterator[tuple[MatmulCase, dict[str, Any]]]:
    """Tunes all large cases with the rows of a step; other numbers of rows take its configs."""
    return tuning.sweep([case for case in LARGE_MATMUL if case.rows == 16], tune, end, file)


def tune(case: MatmulCase, end: float) -> tuning.Found | None:
    """The key and the fastest config of a case, and its figures."""
    x, weight = random(case)
    block, blocks = triton.blocks_of(weight, case.inputs)
    options = dict.fromkeys([triton.rule(weight, case.inputs), *configs(case.outputs, blocks)])
    functions = {config: functools.partial(triton.matmul, config=config) for config in options}
    found = tuning.fastest(functions, x, [(each,) for each in copies_of(weight, case.bytes, most=8)], end)
    if found is None:
        return None
    config, row = found
    row = {"case": case.name, **row, "bytes": case.bytes, "config": vars(config)}
    return triton.key(weight, blocks * block), config, row


def random(case: MatmulCase) -> tuple[jax.Array, Weight]:
    """Rows and a weight of random bits, made on the device."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (case.rows, case.inputs), jnp.bfloat16)
    if case.weights == "dense":
        return x, jax.random.normal(keys[1], (case.outputs, case.inputs), jnp.bfloat16)
    if case.weights == "w8":
        values = jax.random.bits(keys[1], (case.outputs, case.inputs), jnp.uint8).view(jnp.int8)
        return x, W8(values, jnp.full(case.outputs, 1e-3, jnp.float32))
    padded = -(-case.inputs // BLOCK) * BLOCK
    words = jax.random.bits(keys[1], (padded // 4, case.outputs), jnp.uint16).view(jnp.int16)
    scales = jnp.full((padded // case.group_size, case.outputs), 1e-3, jnp.float16)
    return x, W4(words, scales, case.group_size)


def configs(outputs: int, blocks: int) -> Iterator[triton.Config]:
    """Every config worth a try, those nearest to the rule for w4 first."""
    options = []
    for tile, warps, stages in itertools.product((128, 64, 256, 32), (2, 4, 8, 1), (4, 3, 6)):
        if outputs % tile or (tile <= 32 and warps == 8) or (tile > 64 and warps == 1):
            continue
        for splits in dict.fromkeys(-(-blocks // share) for share in range(blocks, 1, -1)):
            programs = outputs // tile * splits
            if programs <= 1400 or splits == 1:
                waves = abs(programs - 200) / 200
                options.append((waves + (tile != 128) + (warps != 2) + (stages != 4), tile, splits, warps, stages))
    for _, tile, splits, warps, stages in sorted(options):
        yield triton.Config(tile, splits, warps, stages)
