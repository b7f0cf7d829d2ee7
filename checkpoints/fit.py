"""What fits on this device: bytes of a model at each weights format, bytes of KV per token, the context left over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from checkpoints.formats import stored_bytes
from checkpoints.source import parameter_table
from dflash_jax.models.config import DrafterConfig, ModelConfig

_FORMATS = {"f32": ("f32", 32), "bf16": ("bf16", 32), "w8": ("w8", 32), "w4 g32": ("w4", 32), "w4 g128": ("w4", 128)}
_USABLE = 0.9
"""Share of the memory for weights and KV; the rest is for activations and programs."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def what_fits(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    """Context, bytes on the device by weights format, KV bytes per token, and the longest context beside the weights.

    Every layer with K and V of its own stores those of all tokens, in bfloat16 on a GPU and f32 on a CPU. The context
    is at most the model's own; 0 means that the weights alone do not fit.
    """
    table = parameter_table(config)
    weights = {
        label: sum(stored_bytes(name, parameter, *chosen) for name, parameter in table.items())
        for label, chosen in _FORMATS.items()
    }
    per_token = _kv_numbers(config) * (2 if jax.default_backend() == "gpu" else 4)
    available, where = device_memory()
    own = config.context_length if isinstance(config, ModelConfig) else None
    longest = {label: max(0, int((available * _USABLE - size) // per_token)) for label, size in weights.items()}
    return {
        **({} if own is None else {"context_length": own}),
        "device_bytes": weights,
        "kv_bytes_per_token": per_token,
        "memory": where,
        "memory_bytes": available,
        "longest_context": longest if own is None else {label: min(own, fits) for label, fits in longest.items()},
    }


def device_memory() -> tuple[int, str]:
    """Bytes that the default device may use, and whose they are: the device's, or the host's where it says nothing."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]), f"memory of {device.device_kind}"
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(host, int(_CGROUP_LIMIT.read_text())), "host RAM"
    except (OSError, ValueError):  # no control group, or one without a limit
        return host, "host RAM"


def _kv_numbers(config: ModelConfig | DrafterConfig) -> int:
    if isinstance(config, DrafterConfig):
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return sum(2 * layer.num_kv_heads * layer.head_dim for layer in config.layers if layer.kv_source is None)
