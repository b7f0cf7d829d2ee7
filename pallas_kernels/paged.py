"""What the kernels over paged KV can take, and what the device can."""

from __future__ import annotations

import jax

_LEAST = 16


def why_not(page_size: int, *head_dims: int) -> str | None:
    """What is wrong about these sizes, as the end of a sentence; None when the kernels take them."""
    for name, size in (("page_size", page_size), *(("head_dim", size) for size in head_dims)):
        if size & (size - 1) or size < _LEAST:
            return f"takes powers of two from {_LEAST} on, got {name} {size}"
    return None


def default_implementation(page_size: int, *head_dims: int) -> str:
    """Triton on a GPU for the sizes that it takes; the reference elsewhere."""
    return "triton" if jax.default_backend() == "gpu" and why_not(page_size, *head_dims) is None else "reference"


def on_hopper() -> bool:
    """Whether the device has the large matrix instruction of Mosaic GPU's kernels."""
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", None) == "9.0"
