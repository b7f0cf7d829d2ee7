"""The choice of experts as two Pallas Triton kernels, where XLA makes eight.

    grid (experts / 16, blocks of inputs, rows / 16)    scores before the norm, of one block of inputs each
    grid (rows)                                         adds the blocks up, norms, softmax, the largest

A row's rms is one factor of all its scores, so the second kernel computes it, from the row that it norms anyway.
Products are exact in f32: no tensor cores.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_choice.reference import Choice
from pallas_kernels.residual_norm.triton import warps_of_row

MOST_ROWS = 256
"""More rows go to XLA, which has one large product for them: 1,024 rows take it 71 us, and this 275 (H100)."""
_TILE = 16
_BLOCKS = (64, 32)


def why_not(router: Float[Array, "experts dim"]) -> str | None:
    """What the kernels cannot take about a router, as the end of a sentence; None when they can."""
    experts, dim = router.shape
    if experts % _TILE:
        return f"takes a multiple of {_TILE} experts, got {experts}"
    return f"takes a multiple of {_BLOCKS[-1]} inputs, got {dim}" if dim % _BLOCKS[-1] else None


@functools.partial(jax.jit, static_argnames=("active", "eps", "interpret"))
def choose_experts(
    x: Float[Array, "rows dim"],
    router: Float[Array, "experts dim"],
    router_scale: Float[Array, " dim"],
    expert_scale: Float[Array, " experts"],
    scale: Float[Array, " dim"],
    source: Int[Array, " rows"] | None,
    *,
    active: int,
    eps: float,
    interpret: bool = False,
) -> Choice:
    """See `api.choose_experts`. Raises NotImplementedError for what the kernels do not take."""
    reason = why_not(router)
    if reason:
        raise NotImplementedError(f"choose_experts on Triton {reason}")
    (rows, dim), experts = x.shape, len(router)
    block = next(block for block in _BLOCKS if dim % block == 0)
    blocks, row_tiles = dim // block, pl.cdiv(rows, _TILE)
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    parts = pl.pallas_call(
        functools.partial(_scores, block=block),
        grid=(experts // _TILE, blocks, row_tiles),
        in_specs=[whole] * 3,
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((blocks, row_tiles * _TILE, experts), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="expert_scores",
    )(x, router, router_scale)
    width = pl.next_power_of_2(dim)
    sources = () if source is None else (source,)
    return Choice(
        *pl.pallas_call(
            functools.partial(_choose, width=width, lanes=pl.next_power_of_2(experts), active=active, eps=eps),
            grid=(rows,),
            in_specs=[whole] * (4 + len(sources)),
            out_specs=[whole] * 3,
            out_shape=[
                jax.ShapeDtypeStruct((rows, active), jnp.int32),
                jax.ShapeDtypeStruct((rows, active), jnp.float32),
                jax.ShapeDtypeStruct(x.shape, x.dtype),
            ],
            compiler_params=plt.CompilerParams(num_warps=warps_of_row(width), num_stages=1),
            interpret=interpret,
            name="expert_choice",
        )(x, parts, expert_scale, scale, *sources)
    )


def _scores(x_ref, router_ref, scale_ref, parts_ref, *, block: int) -> None:
    tile, number, row_tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    inputs, experts, rows = pl.ds(number * block, block), pl.ds(tile * _TILE, _TILE), pl.ds(row_tile * _TILE, _TILE)
    there = row_tile * _TILE + jnp.arange(_TILE, dtype=jnp.int32) < x_ref.shape[0]
    mask = jnp.broadcast_to(there[:, None], (_TILE, block))
    x = plt.load(x_ref.at[rows, inputs], mask=mask, other=0.0).astype(jnp.float32)
    router = plt.load(router_ref.at[experts, inputs])
    product = plt.dot(
        x * plt.load(scale_ref.at[inputs])[None, :], router, trans_b=True, precision=jax.lax.Precision.HIGHEST
    )
    plt.store(parts_ref.at[number, rows, experts], product)


def _choose(
    x_ref, parts_ref, expert_scale_ref, scale_ref, *refs, width: int, lanes: int, active: int, eps: float
) -> None:
    *source_refs, chosen_ref, weights_ref, normed_ref = refs
    row, (blocks, _, experts), dim = pl.program_id(0), parts_ref.shape, x_ref.shape[1]
    source = row
    for source_ref in source_refs:
        source = jnp.clip(source_ref[row], 0, x_ref.shape[0] - 1)
    inside = jnp.arange(width, dtype=jnp.int32) < dim
    x = plt.load(x_ref.at[source, pl.ds(0, width)], mask=inside, other=0.0).astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.sum(x * x) / dim + eps)
    normed = x * factor * plt.load(scale_ref.at[pl.ds(0, width)], mask=inside, other=0.0)
    plt.store(normed_ref.at[row, pl.ds(0, width)], normed.astype(normed_ref.dtype), mask=inside)

    numbers = jnp.arange(lanes, dtype=jnp.int32)
    real = numbers < experts
    scores = jnp.zeros(lanes, jnp.float32)
    for block in range(blocks):
        scores += plt.load(parts_ref.at[jnp.int32(block), source, pl.ds(0, lanes)], mask=real, other=0.0)
    scores = jnp.where(real, scores * factor, -jnp.inf)
    powers = jnp.exp(scores - jnp.max(scores))
    left = jnp.where(real, powers / jnp.sum(powers), -1.0)
    # A place for each: comparing all with all is one step, taking the largest out would be one after the other. Of
    # two, the one that is not smaller stands in front, so that scores that are no numbers have places too.
    one, other = left[:, None], left[None, :]
    before = jnp.where(numbers[:, None] < numbers[None, :], ~(one < other), one > other)
    place = jnp.sum(before.astype(jnp.int32), axis=0)
    found = place < active
    total = jnp.sum(jnp.where(found, left, 0.0))
    scales = plt.load(expert_scale_ref.at[pl.ds(0, lanes)], mask=real, other=0.0)
    plt.store(chosen_ref.at[row, place], numbers, mask=found)
    plt.store(weights_ref.at[row, place], left / total * scales, mask=found)
