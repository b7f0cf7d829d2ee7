"""Rows times the matrices of the groups that they chose, as a Pallas Triton kernel: what nobody chose is not read.

A group is one matrix of several that stand below each other, an expert of a mixture. One program makes a tile of a
group's outputs for all rows that chose it, 16 at a time, over all inputs:

    grid (output tiles, groups)     who chose the group? leave if nobody did; for each tile of 16 of them:
      for each block of inputs      gather their numbers; weights and dots as in quantised_matmul
                                    activation(gate) * up, if the group's first half of outputs is a gate; scatter

Few rows are looked up by every program in the list of choices; of many rows, XLA sorts the choices first. Rows never
mix, and a row's bits do not depend on who else chose its groups, nor on its place among them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.quantised_matmul import triton as dense
from pallas_kernels.quantised_matmul.triton import PLANE, UNIT_W4, add_w4
from pallas_kernels.quantised_matmul.weights import BLOCK, W4, W8, Weight, outputs_of

MOST_LISTED = 512
"""Choices that every program looks through; more of them are sorted."""
_TILES = (128, 64, 32)
_ROW_TILE, _WIDE_ROW_TILE = 16, 64
_WIDE_FROM = 32
"""Rows of a group, in the mean, from which on the tiles of rows are wide."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a matmul is cut into programs: `tile` outputs each, of gate and up if there are both."""

    tile: int
    warps: int
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What is known when the kernel is compiled: a group has `outputs`, of which half come out if they are gated."""

    groups: int
    outputs: int
    active: int
    inputs: int
    block: int
    row_tile: int
    group_size: int | None
    activation: Callable[[Array], Array] | None

    @property
    def width(self) -> int:
        return self.outputs if self.activation is None else self.outputs // 2


def grouped_matmul(
    x: Float[Array, "R K"],
    weight: Weight,
    chosen: Int[Array, "R A"],
    *,
    groups: int,
    activation: Callable[[Array], Array] | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "R A N"]:
    """See `api.grouped_matmul`. Raises NotImplementedError for what the kernel does not take.

    Without a config, that of `rule`. Raises ValueError for one that leaves outputs out.
    """
    reason = why_not(x.dtype, weight, groups=groups, gated=activation is not None)
    if reason:
        raise NotImplementedError(f"grouped_matmul on Triton {reason}")
    (rows, inputs), active = x.shape, chosen.shape[1]
    many = rows * active > _WIDE_FROM * groups
    shape = _Shape(
        groups=groups,
        outputs=outputs_of(weight) // groups,
        active=active,
        inputs=inputs,
        block=dense.blocks_of(weight, inputs)[0],
        row_tile=_WIDE_ROW_TILE if many else _ROW_TILE,
        group_size=weight.group_size if isinstance(weight, W4) else None,
        activation=activation,
    )
    config = config or rule(shape)
    if shape.width % config.tile:
        raise ValueError(f"{config} does not divide {shape.width} outputs")
    return _run(x, weight, chosen, shape, config, interpret).reshape(rows, active, shape.width)


def rule(shape: _Shape) -> Config:
    """What was fastest on an H100 for w4 and 16 rows that choose 8 to 82 groups; gates and many rows need registers."""
    large = shape.activation is not None or shape.row_tile > _ROW_TILE or shape.group_size is None
    tile = next(tile for tile in (_TILES[1:] if large else _TILES) if shape.width % tile == 0)
    return Config(tile, 4 if large else dense.warps_of(tile))


def why_not(dtype: Any, weight: Weight, *, groups: int, gated: bool) -> str | None:
    """What the kernel cannot take about these arguments, as the end of a sentence; None when it can."""
    width = outputs_of(weight) // groups // (2 if gated else 1)
    if width % _TILES[-1]:
        return f"takes a multiple of {_TILES[-1]} outputs of a group, got {width}"
    return dense.why_not(1, dtype, weight)


@functools.partial(jax.jit, static_argnames=("shape", "config", "interpret"))
def _run(
    x: Array, weight: Weight, chosen: Array, shape: _Shape, config: Config, interpret: bool
) -> Float[Array, "pairs N"]:
    pairs = chosen.size
    listed = (chosen.reshape(-1),)
    if pairs > MOST_LISTED:
        listed = _sorted_choices(listed[0], shape.groups)
    if isinstance(weight, W4):
        weights = (weight.packed, weight.scales)
    else:
        weights = (weight.values, weight.scales) if isinstance(weight, W8) else (weight,)
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    return pl.pallas_call(
        functools.partial(_kernel, shape=shape, tile=config.tile, lists=len(listed), interpret=interpret),
        grid=(shape.width // config.tile, shape.groups),
        in_specs=[whole] * (1 + len(listed) + len(weights)),
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((pairs, shape.width), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="grouped_matmul",
    )(x, *listed, *weights)


def _sorted_choices(chosen: Int[Array, " pairs"], groups: int) -> tuple[Int[Array, " pairs"], Int[Array, " ends"]]:
    """Places of the choices in the order of groups, and where each group begins in it."""
    clipped = jnp.clip(chosen, 0, groups - 1)
    below = clipped[None, :] < jnp.arange(groups + 1, dtype=jnp.int32)[:, None]
    return jnp.argsort(clipped, stable=True), jnp.sum(below, axis=1, dtype=jnp.int32)


def _kernel(x_ref, *refs, shape: _Shape, tile: int, lists: int, interpret: bool) -> None:
    weight_refs, out_ref = refs[lists:-1], refs[-1]
    column, group = pl.program_id(0), pl.program_id(1)
    if lists == 1:
        count, places_of = _listed(refs[0], group, shape)
    else:
        count, places_of = _in_order(refs[0], refs[1], group, shape)
    first = group * shape.outputs + column * tile
    halves = range(1 if shape.activation is None else 2)
    outputs = [pl.ds(first + half * shape.width, tile) for half in halves]

    def visit(number, _):
        places, there = places_of(number)
        rows = jax.lax.div(places, jnp.int32(shape.active))

        def load(start, size):
            row, here, column = _spread(size, rows, there, start)
            inside = here & (column < shape.inputs) if shape.inputs % shape.block else here
            return plt.load(x_ref.at[row, column], mask=inside, other=0.0)

        totals = _products(load, weight_refs, outputs, shape, interpret)
        rounded = [total.astype(x_ref.dtype).astype(jnp.float32) for total in totals]
        result = rounded[0]
        if shape.activation is not None:
            result = shape.activation(result).astype(x_ref.dtype).astype(jnp.float32) * rounded[1]
        place, here, number = _spread(tile, places, there, column * tile)
        plt.store(out_ref.at[place, number], result.astype(x_ref.dtype), mask=here)

    jax.lax.fori_loop(0, jax.lax.div(count + (shape.row_tile - 1), jnp.int32(shape.row_tile)), visit, None)


def _spread(size, rows, there, start):
    """Row, whether there is one, and column of each number of a tile."""
    shape = (rows.size, size)
    columns = start + jnp.arange(size, dtype=jnp.int32)
    return *(jnp.broadcast_to(each[:, None], shape) for each in (rows, there)), jnp.broadcast_to(columns[None], shape)


def _listed(chosen_ref, group, shape: _Shape):
    """How many chose the group, and a function for the places in the list of a tile of them, and which there are."""
    pairs = chosen_ref.shape[0]
    places = jnp.arange(max(16, pl.next_power_of_2(pairs)), dtype=jnp.int32)
    inside = places < pairs
    chosen = plt.load(chosen_ref.at[pl.ds(0, places.size)], mask=inside, other=0)
    mine = inside & (jnp.clip(chosen, 0, shape.groups - 1) == group)
    rank = jnp.where(mine, jnp.cumsum(mine.astype(jnp.int32)), 0)  # from 1 on
    count = jnp.max(rank)

    def places_of(number):
        wanted = number * shape.row_tile + 1 + jnp.arange(shape.row_tile, dtype=jnp.int32)
        found = rank[None, :] == wanted[:, None]
        place = jnp.sum(jnp.where(found, places[None, :], 0), axis=1)
        # Those that are not there have no place: simulated stores to one place get in each other's way.
        return jnp.where(wanted <= count, place, pairs), wanted <= count

    return count, places_of


def _in_order(order_ref, starts_ref, group, shape: _Shape):
    """The same of choices that are sorted."""
    start, end = starts_ref[group], starts_ref[group + 1]

    def places_of(number):
        wanted = start + number * shape.row_tile + jnp.arange(shape.row_tile, dtype=jnp.int32)
        return plt.load(order_ref.at[wanted], mask=wanted < end, other=order_ref.shape[0]), wanted < end

    return end - start, places_of


def _products(load, weight_refs, outputs, shape: _Shape, interpret: bool):
    """Rows times the weights of each tile of outputs, in f32."""
    values_ref, *scales_refs = weight_refs

    def add_words(block, totals):
        planes = [load(block * BLOCK + plane * PLANE, PLANE) for plane in range(4)]
        per_plane = {"per_plane": shape.group_size != BLOCK, "interpret": interpret}
        return tuple(
            add_w4(total, planes.__getitem__, values_ref, scales_refs[0], block, tile, **per_plane)
            for total, tile in zip(totals, outputs, strict=True)
        )

    def add_values(block, totals):
        inputs = pl.ds(block * shape.block, shape.block)
        x = load(block * shape.block, shape.block)
        return tuple(
            total + plt.dot(x, plt.load(values_ref.at[tile, inputs]).astype(x.dtype), trans_b=True)
            for total, tile in zip(totals, outputs, strict=True)
        )

    nothing = (jnp.zeros((shape.row_tile, outputs[0].size), jnp.float32),) * len(outputs)
    four = shape.group_size is not None
    totals = jax.lax.fori_loop(0, pl.cdiv(shape.inputs, shape.block), add_words if four else add_values, nothing)
    if four:
        return [total * UNIT_W4 for total in totals]
    if not scales_refs:
        return totals
    return [total * plt.load(scales_refs[0].at[tile])[None, :] for total, tile in zip(totals, outputs, strict=True)]
