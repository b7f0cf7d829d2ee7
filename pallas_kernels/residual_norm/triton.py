"""The update of the residual stream and its norm as one Pallas Triton kernel: a program per row.

XLA makes seven kernels of a sum of parts, a norm, an addition and another norm of few long rows: it splits each of the
sums over a row in two, and turns the rows around between them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

_WARPS = 8
_LEAST_NUMBERS = 64
"""A warp has so many numbers of a row at least."""


def warps_of_row(width: int) -> int:
    """Of a program that keeps so many numbers, a row of the stream."""
    return max(1, min(_WARPS, width // _LEAST_NUMBERS))


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def residual_norm(
    parts: Float[Array, "parts rows dim"],
    stream: Float[Array, "rows dim"],
    scale: Float[Array, " dim"],
    *,
    post_scale: Float[Array, " dim"] | None = None,
    factor: Float[Array, " 1"] | None = None,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "rows dim"], Float[Array, "rows dim"]]:
    """See `api.residual_norm`."""
    dim = stream.shape[1]
    width = pl.next_power_of_2(dim)
    optional = [each for each in (post_scale, factor) if each is not None]
    kernel = functools.partial(
        _kernel, width=width, sandwich=post_scale is not None, scaled=factor is not None, eps=eps
    )
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    shape = jax.ShapeDtypeStruct(stream.shape, stream.dtype)
    new_stream, normed = pl.pallas_call(
        kernel,
        grid=(len(stream),),
        in_specs=[whole] * (3 + len(optional)),
        out_specs=[whole] * 2,
        out_shape=[shape] * 2,
        compiler_params=plt.CompilerParams(num_warps=warps_of_row(width), num_stages=1),
        interpret=interpret,
        name="residual_norm",
    )(parts, stream, scale, *optional)
    return new_stream, normed


def _kernel(parts_ref, stream_ref, scale_ref, *refs, width: int, sandwich: bool, scaled: bool, eps: float) -> None:
    *optional, stream_out_ref, normed_ref = refs
    row, (count, _, dim) = pl.program_id(0), parts_ref.shape
    numbers, inside = pl.ds(0, width), jnp.arange(width) < dim

    def load(ref, *place):
        return plt.load(ref.at[(*map(jnp.int32, place), numbers)], mask=inside, other=0.0).astype(jnp.float32)

    def normed(x, scale):
        return x * jax.lax.rsqrt(jnp.sum(x * x) / dim + eps) * scale

    def rounded(x):
        return x.astype(stream_ref.dtype).astype(jnp.float32)

    update = load(parts_ref, 0, row)
    for part in range(1, count):
        update += load(parts_ref, part, row)
    update = rounded(update)
    if sandwich:
        update = rounded(normed(update, load(optional[0])))
    stream = rounded(load(stream_ref, row) + update)
    if scaled:
        stream = rounded(stream * rounded(optional[-1][0]))
    plt.store(stream_out_ref.at[row, numbers], stream.astype(stream_ref.dtype), mask=inside)
    plt.store(normed_ref.at[row, numbers], normed(stream, load(scale_ref)).astype(stream_ref.dtype), mask=inside)
