"""What fits on this device: bytes of a model at each weights format, bytes of KV per token, the context left over."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax

from checkpoints.formats import stored_bytes
from checkpoints.source import parameter_table
from dflash_jax.models.config import DrafterConfig, ModelConfig
from dflash_jax.models.ring import Ring, ring_of

_FORMATS = {"f32": ("f32", 32), "bf16": ("bf16", 32), "w8": ("w8", 32), "w4 g32": ("w4", 32), "w4 g128": ("w4", 128)}
_USABLE = 0.9
"""Share of the memory for weights and KV; the rest is for activations and programs."""
_GPU_SIZES = {"chunk": 1024, "visit": 272, "page_size": 128}
_CPU_SIZES = {"chunk": 256, "visit": 136, "page_size": 256}
"""Of the engine's profiles: the storage of layers with a window depends on them."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def what_fits(config: ModelConfig | DrafterConfig) -> dict[str, Any]:
    """Context, bytes on the device by weights format, KV bytes per token, and the longest context beside the weights.

    K and V are bfloat16 on a GPU and f32 on a CPU. Layers with a window cost a sequence a fixed number of bytes, all
    others the same for every token. The context is that of a single sequence without a scorer, and at most the model's
    own; 0 means that the weights alone do not fit.
    """
    table = parameter_table(config)
    weights = {
        label: sum(stored_bytes(name, parameter, *chosen) for name, parameter in table.items())
        for label, chosen in _FORMATS.items()
    }
    cost = _cost_here(config)
    available, where = device_memory()
    own = {"context_length": config.context_length} if isinstance(config, ModelConfig) else {}
    most = own.get("context_length", sys.maxsize)
    return {
        **own,
        "device_bytes": weights,
        "kv_bytes_per_token": cost.per_token,
        **({"kv_bytes_per_sequence": cost.sliding * cost.held} if cost.sliding else {}),
        "memory": where,
        "memory_bytes": available,
        "longest_context": {label: cost.longest(available * _USABLE - size, most) for label, size in weights.items()},
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


@dataclasses.dataclass(frozen=True)
class KvCost:
    """A sequence of n tokens costs `per_token * n + sliding * min(n, held)` bytes of K and V."""

    per_token: int
    sliding: int = 0
    held: int = 0

    def bytes_of(self, tokens: int) -> int:
        """K and V of a sequence."""
        return self.per_token * tokens + self.sliding * min(tokens, self.held)

    def longest(self, room: float, most: int) -> int:
        """Tokens of the longest sequence whose K and V fit into so many bytes, `most` at most."""
        tokens = room // (self.per_token + self.sliding)
        if tokens >= self.held:
            tokens = (room - self.sliding * self.held) // self.per_token if self.per_token else most
        return int(min(most, max(0, tokens)))


def kv_cost(config: ModelConfig | DrafterConfig, ring: Ring | None, width: int) -> KvCost:
    """Of the pools of a network, `width` bytes a number; a drafter has no ring."""
    if isinstance(config, DrafterConfig):
        return KvCost(2 * config.num_layers * config.num_kv_heads * config.head_dim * width)
    total, sliding = 0, 0
    for layer in config.own_layers:
        in_ring = ring is not None and layer.window is not None
        total += width * config.kv_numbers(layer)
        sliding += width * config.kv_numbers(layer) if in_ring else 0
    return KvCost(total - sliding, sliding, ring.most_held * ring.page_size if ring else 0)


def _cost_here(config: ModelConfig | DrafterConfig) -> KvCost:
    on_gpu = jax.default_backend() == "gpu"
    width = 2 if on_gpu else 4
    if isinstance(config, DrafterConfig):
        return kv_cost(config, None, width)
    sizes = _GPU_SIZES if on_gpu else _CPU_SIZES
    ring = ring_of(config, pages_per_sequence=-(-config.context_length // sizes["page_size"]), **sizes)
    return kv_cost(config, ring, width)
