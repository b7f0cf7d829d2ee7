"""The sum of experts and the dense MLP as one Pallas Triton kernel: a program per row, as in residual_norm."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.residual_norm.triton import warps_of_row


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def expert_sum(
    back: Float[Array, "places dim"],
    place: Int[Array, " choices"] | None,
    weights: Float[Array, "rows active"],
    scale: Float[Array, " dim"],
    parts: Float[Array, "parts rows dim"],
    parts_scale: Float[Array, " dim"],
    *,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "rows dim"]:
    """See `api.expert_sum`."""
    rows, dim = len(weights), back.shape[1]
    arrays = (back, *([] if place is None else [place]), weights, scale, parts, parts_scale)
    width = pl.next_power_of_2(dim)
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    return pl.pallas_call(
        functools.partial(_kernel, width=width, eps=eps),
        grid=(rows,),
        in_specs=[whole] * len(arrays),
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((rows, dim), back.dtype),
        compiler_params=plt.CompilerParams(num_warps=warps_of_row(width), num_stages=1),
        interpret=interpret,
        name="expert_sum",
    )(*arrays)


def _kernel(back_ref, *refs, width: int, eps: float) -> None:
    *places, weights_ref, scale_ref, parts_ref, parts_scale_ref, out_ref = refs
    row, (active, dim) = pl.program_id(0), (weights_ref.shape[1], back_ref.shape[1])
    numbers, inside = pl.ds(0, width), jnp.arange(width, dtype=jnp.int32) < dim

    def load(ref, *index):
        return plt.load(ref.at[(*map(jnp.int32, index), numbers)], mask=inside, other=0.0).astype(jnp.float32)

    def rounded(x):
        return x.astype(back_ref.dtype).astype(jnp.float32)

    def normed(x, scale):
        x = rounded(x)
        return rounded(x * jax.lax.rsqrt(jnp.sum(x * x) / dim + eps) * scale)

    # All loads come first: behind a sum over the row each would cost a round trip through memory.
    scale, parts_scale = load(scale_ref), load(parts_scale_ref)
    mixed = jnp.zeros(width, jnp.float32)
    for rank in range(active):
        choice = row * active + rank
        place = places[0][choice] if places else choice
        mixed += rounded(load(back_ref, place) * rounded(weights_ref[row, rank]))
    total = load(parts_ref, 0, row)
    for part in range(1, parts_ref.shape[0]):
        total += load(parts_ref, part, row)
    result = normed(total, parts_scale) + normed(mixed, scale)
    plt.store(out_ref.at[row, numbers], result.astype(out_ref.dtype), mask=inside)
