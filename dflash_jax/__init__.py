"""Speculative prefill (PFlash) and block-diffusion decoding (DFlash) for one big model on one GPU, in JAX.

target = dflash_jax.load_target(path)
engine = dflash_jax.Engine.load(path, drafter=..., pflash="auto", dflash="auto")
result = engine.generate("Hello", max_tokens=20)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dflash_jax.engine.engine import Engine
    from dflash_jax.engine.target import Target, load_target

__all__ = ["Engine", "Target", "load_target"]

_HOMES = {
    "Engine": "dflash_jax.engine.engine",
    "Target": "dflash_jax.engine.target",
    "load_target": "dflash_jax.engine.target",
}


def __getattr__(name: str) -> Any:
    # JAX takes a second to import: `dflash-jax --help` and the records of requests do without it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dflash_jax' has no attribute {name!r}")
