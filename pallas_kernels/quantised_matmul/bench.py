"""Finds the fastest Config of each case on this device and writes it to tuned.json.

python -m pallas_kernels.quantised_matmul.bench [--seconds 120]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import LARGE_MATMUL, MatmulCase
from pallas_kernels.quantised_matmul import triton
from pallas_kernels.quantised_matmul.weights import BLOCK, W4, W8
from pallas_kernels.timing import copies_of, seconds_per_call


def main() -> None:
    """Sweeps until the time is used up, best guesses first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path(triton.__file__).with_name("tuned.json"))
    arguments = parser.parse_args()
    end = time.perf_counter() + arguments.seconds
    device = jax.devices()[0].device_kind
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    cases = [case for case in LARGE_MATMUL if case.rows == 16]  # the rows of a step; other numbers take its configs
    for index, case in enumerate(cases):
        share = (end - time.perf_counter()) / (len(cases) - index)
        best = tune(case, time.perf_counter() + share)
        if best:
            known.setdefault(device, {})[best.pop("key")] = best
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def tune(case: MatmulCase, end: float) -> dict[str, Any] | None:
    """The fastest config of a case, with its key; prints every time beside the first one's."""
    x, weight = random(case)
    blocks = -(-case.inputs // BLOCK)
    sets = [(each,) for each in copies_of(weight, case.bytes, most=8)]
    times: list[tuple[float, triton.Config]] = []
    for config in configs(case.outputs, blocks):
        if times and time.perf_counter() > end:
            break
        try:
            times.append((seconds_per_call(functools.partial(triton.matmul, config=config), x, sets), config))
        except Exception as error:  # shapes that the compiler refuses
            print(case.name, config, str(error).splitlines()[0][:100], flush=True)
    if not times:
        return None
    best, config = min(times, key=lambda pair: pair[0])
    row = {"case": case.name, "us": round(1e6 * best, 1), "first_us": round(1e6 * times[0][0], 1), "tried": len(times)}
    print(json.dumps({**row, "bytes": case.bytes, "config": vars(config)}), flush=True)
    return {"key": triton.key(weight, blocks), **vars(config)}


def random(case: MatmulCase) -> tuple[jax.Array, W4 | W8]:
    """Rows and a weight of random bits, made on the device."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (case.rows, case.inputs), jnp.bfloat16)
    if case.weights == "w8":
        values = jax.random.bits(keys[1], (case.outputs, case.inputs), jnp.uint8).view(jnp.int8)
        return x, W8(values, jnp.full(case.outputs, 1e-3, jnp.float32))
    padded = -(-case.inputs // BLOCK) * BLOCK
    words = jax.random.bits(keys[1], (padded // 4, case.outputs), jnp.uint16).view(jnp.int16)
    scales = jnp.full((padded // case.group_size, case.outputs), 1e-3, jnp.float16)
    return x, W4(words, scales, case.group_size)


def configs(outputs: int, blocks: int) -> Iterator[triton.Config]:
    """Every config worth a try, those of most programs in the first waves first."""
    options = []
    for tile, warps, stages in itertools.product((128, 64, 256, 32), (4, 8, 2), (4, 3, 6)):
        if outputs % tile or (tile <= 32 and warps == 8):
            continue
        for splits in range(1, blocks // 2 + 1):
            programs = outputs // tile * splits
            if blocks % splits == 0 and (130 <= programs <= 1400 or splits == 1):
                waves = abs(programs - 400) / 400
                options.append((waves + (tile != 128) + (warps != 4) + (stages != 4), tile, splits, warps, stages))
    for _, tile, splits, warps, stages in sorted(options):
        yield triton.Config(tile, splits, warps, stages)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
