"""What all benchmarks share: reading prompts, and one JSON object that says what was measured where and how."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dflash_jax.engine.request import RequestError
from pallas_kernels.operations import Limits

_PACKAGES = ("dflash-jax", "jax", "jaxlib", "flax", "numpy")
BANDWIDTH = {"NVIDIA H100 80GB HBM3": 2.84e12, "NVIDIA H200": 4.0e12}
"""Bytes per second: read bandwidth measured on the H100; about 83 % of the data sheet's 4.8 TB/s for the H200."""
FLOPS = {"NVIDIA H100 80GB HBM3": 6.0e14, "NVIDIA H200": 6.0e14}
"""Operations per second of a large bf16 matmul, as XLA reaches it."""
Prompt = str | list[dict[str, Any]]


def read_prompts(path: Path | None) -> list[Prompt]:
    """The prompts of a JSON-lines file ({"messages": [...]} or {"prompt": "..."}), or eight of our own.

    Raises RequestError that names the line that is neither.
    """
    own = importlib.resources.files("dflash_jax.bench") / "prompts.jsonl"
    text = own.read_text(encoding="utf-8") if path is None else path.read_text(encoding="utf-8")
    return [
        _prompt(line, f"{path or 'prompts.jsonl'}, line {n}")
        for n, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    found = row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(found, str | list):
        raise RequestError(f'{where} must be {{"messages": [...]}} or {{"prompt": "..."}}')
    return found


def environment() -> dict[str, Any]:
    """Device, versions and command of this run."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    name = device.device_kind if device.platform != "cpu" else f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    command = " ".join(["dflash-jax", *(str(argument) for argument in sys.argv[1:])])
    return {"device": name, "versions": versions, "command": command}


def device_limits() -> Limits | None:
    """What the default device can do at best; None if nobody has measured it."""
    kind = jax.devices()[0].device_kind
    return Limits(BANDWIDTH[kind], FLOPS[kind]) if kind in BANDWIDTH else None


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """Writes a report where the user asked for it."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
