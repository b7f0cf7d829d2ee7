"""What the Mosaic GPU kernels for Hopper cards share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

LINES = 64
"""Lines of a warpgroup: what its matrix instruction takes."""
_OF_AN_H100 = 132


def on_hopper() -> bool:
    """Whether the device has the large matrix instruction of Mosaic GPU's kernels."""
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def most_programs() -> int:
    """What runs at once: one for each multiprocessor, whose registers or shared memory hold no second one.

    As many as on an H100 where there is no card.
    """
    return getattr(jax.devices()[0], "core_count", None) or _OF_AN_H100


def why_not_pools(*pools: Any) -> str | None:
    """What the kernels cannot take about pools, as the end of a sentence; None when they can."""
    other = next((pool.dtype for pool in pools if pool.dtype != jnp.bfloat16), None)
    return None if other is None else f"takes pools of bf16, got {other}"


def how(*, interpret: bool) -> dict[str, Any]:
    """What `plgpu.kernel` is to do with a kernel."""
    if not interpret:
        return {"compiler_params": plgpu.CompilerParams(approx_math=True)}
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError("Mosaic kernels are interpreted by jax 0.11 and later only")
    return {"interpret": plgpu.InterpretGPUParams()}  # pyright: ignore[reportAttributeAccessIssue]


def shared(*sizes: int, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """Shared memory, laid out as copies and products want it."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(sizes, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def laid(value: Array, *, interpret: bool) -> Array:
    """A number for each line, or a matrix of lines, in the registers where products have it."""
    if interpret:
        return value
    return plgpu.layout_cast(value, plgpu.Layout.WGMMA.reduce(1) if value.ndim == 1 else plgpu.Layout.WGMMA)


def iota(keys: int, axis: int, *, interpret: bool) -> Array:
    """The number of the line or key of each of a block's scores."""
    if interpret:
        return jax.lax.broadcasted_iota(jnp.int32, (LINES, keys), axis)
    return plgpu.broadcasted_iota(jnp.int32, (LINES, keys), axis, layout=plgpu.Layout.WGMMA)
