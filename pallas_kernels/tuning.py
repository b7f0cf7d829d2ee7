"""Configs of kernels that were fastest on a device: looked up by what is traced, found by `bench kernels --tune`.

An operation's tuned.json has, by device and by a key of its own, the fields of its Config. Nothing tunes while serving.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from pallas_kernels.timing import repeated, seconds_of

_REPEATS = 4
_SWEPT = "NVIDIA H100 80GB HBM3"
_SAME_CHIP = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA GH200")
"""Cards with the chip of the one that sweeps ran on; memory and clocks differ, what fits a multiprocessor does not."""


class Named(Protocol):
    """A case of an operation."""

    @property
    def name(self) -> str:
        """Unique within its operation."""
        ...


CaseT = TypeVar("CaseT", bound=Named)
ConfigT = TypeVar("ConfigT", bound=Hashable)
Found = tuple[str, Any, dict[str, Any]]
"""The key and the fastest Config of a case, and its figures."""


def tuned(file: Path, key: str) -> dict[str, Any] | None:
    """The fields of the Config that was fastest on the device at hand, or on the card that stands for its chip.

    None if the file has neither.
    """
    known, device = _cached(file), jax.devices()[0].device_kind
    stands_for = _SWEPT if device.startswith(_SAME_CHIP) else device
    return known.get(device, {}).get(key) or known.get(stands_for, {}).get(key)


def _read(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


_cached = functools.cache(_read)
"""What is traced asks for each layer."""


def sweep(
    cases: Sequence[CaseT], tune: Callable[[CaseT, float], Found | None], end: float, file: Path
) -> Iterator[tuple[CaseT, dict[str, Any]]]:
    """Tunes case by case until the clock says `end`; yields each with its figures.

    The best config of a case goes into the file at once.
    """
    device = jax.devices()[0].device_kind
    known = _read(file)
    for index, case in enumerate(cases):
        share = (end - time.perf_counter()) / (len(cases) - index)
        found = tune(case, time.perf_counter() + share)
        if found is None:
            continue
        key, config, row = found
        known.setdefault(device, {})[key] = vars(config)
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)
        yield case, row


def fastest(
    functions: Mapping[ConfigT, Callable[..., jax.Array]], first: jax.Array, sets: Sequence[Sequence[Any]], end: float
) -> tuple[ConfigT, dict[str, Any]] | None:
    """The config whose function takes least time, and figures; those that come first are tried first, until `end`.

    Compiling takes longer than timing, and all cores can do it. What the compiler refuses is left out.
    """

    def compiled(config: ConfigT) -> Callable[..., jax.Array] | None:
        try:
            return repeated(functions[config], _REPEATS).lower(first, sets).compile()
        except Exception:  # more shared memory or registers than there are
            return None

    times: list[tuple[float, ConfigT]] = []
    waiting, workers = iter(functions), os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(waiting, 2 * workers)):
            if times and time.perf_counter() > end:
                break
            for config, run in zip(batch, list(pool.map(compiled, batch)), strict=True):
                if run is not None:
                    times.append((seconds_of(run, first, sets) / _REPEATS / len(sets), config))
    if not times:
        return None
    best, config = min(times, key=lambda pair: pair[0])
    return config, {"us": round(1e6 * best, 1), "first_us": round(1e6 * times[0][0], 1), "tried": len(times)}
