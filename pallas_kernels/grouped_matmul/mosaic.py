"""The same for the rows of a chunk with 4-bit weights, on Hopper cards: rows in the order of groups, tile by tile.

XLA sorts the choices and copies the rows that they stand for side by side, each group's from a multiple of 8 on. What
multiplies is the Mosaic kernel of quantised_matmul: every tile of rows has one group, whose outputs it is told. The
last tile of a group computes rows of the next one too; their results have room of their own, and nobody reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.triton import MOST_LISTED, sorted_choices
from pallas_kernels.quantised_matmul import mosaic
from pallas_kernels.quantised_matmul.mosaic import OUTPUTS, Config, Groups, tile_products
from pallas_kernels.quantised_matmul.weights import W4, Weight, outputs_of, padded_inputs

_ALIGNED = 8
"""Rows that copies to shared memory take together."""
_ROWS = (64, 96, 128, 176, 256)
"""Of a tile."""
_SLACK = 1.25
"""Rows that a tile has room for, over those of a group in the mean: most groups have one tile."""


def why_not(choices: int, dtype: Any, weight: Weight, *, groups: int) -> str | None:
    """What the kernel cannot take about these arguments, as the end of a sentence; None when it can."""
    if choices <= MOST_LISTED:
        return f"takes more than {MOST_LISTED} choices, got {choices}"
    if reason := mosaic.why_not(choices, dtype, weight):
        return reason
    outputs = outputs_of(weight) // groups
    return f"takes groups of a multiple of {OUTPUTS} outputs, got {outputs}" if outputs % OUTPUTS else None


def config_for(choices: int, groups: int) -> Config:
    """The smallest tile that has room for a group's rows and some more."""
    wanted = _SLACK * choices / groups
    return Config(next((rows for rows in _ROWS if rows >= wanted), _ROWS[-1]))


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
    """See `api.grouped_matmul`. Raises NotImplementedError for what `why_not` names."""
    reason = why_not(chosen.size, x.dtype, weight, groups=groups)
    if not isinstance(weight, W4) or reason:
        raise NotImplementedError(f"grouped_matmul on Mosaic {reason}")
    config = config or config_for(chosen.size, groups)
    return _run(x, weight, chosen, groups, activation, config, interpret)


@functools.partial(jax.jit, static_argnames=("groups", "activation", "config", "interpret"))
def _run(
    x: Array,
    weight: W4,
    chosen: Array,
    groups: int,
    activation: Callable[[Array], Array] | None,
    config: Config,
    interpret: bool,
) -> Float[Array, "R A N"]:
    choices, active = chosen.size, chosen.shape[1]
    order, starts = sorted_choices(chosen.reshape(-1), groups)
    ordered = jnp.clip(chosen.reshape(-1)[order], 0, groups - 1)
    rank = jnp.arange(choices, dtype=jnp.int32) - starts[ordered]  # among those of its group
    counts = jnp.diff(starts)
    first_rows, tiles = _before(-(-counts // _ALIGNED) * _ALIGNED), -(-counts // config.rows)
    first_tiles = _before(tiles)

    # The last group's last tile reads behind its rows.
    room = -(-choices // _ALIGNED) * _ALIGNED + _ALIGNED * groups + config.rows
    source = jnp.zeros(room, jnp.int32).at[first_rows[ordered] + rank].set(order // active)
    rows = jnp.pad(x, ((0, 0), (0, padded_inputs(weight) - x.shape[1])))[source]

    outputs, tile = outputs_of(weight) // groups, jnp.arange(groups + choices // config.rows, dtype=jnp.int32)
    of_tile = jnp.searchsorted(first_tiles, tile, side="right").astype(jnp.int32) - 1
    places = Groups(
        first_row=first_rows[of_tile] + (tile - first_tiles[of_tile]) * config.rows,
        first_output=jnp.where(tile < jnp.sum(tiles), of_tile * outputs, -outputs),
        outputs=outputs,
    )
    products = tile_products(rows, weight, config, groups=places, interpret=interpret)
    result_row = jnp.zeros(choices, jnp.int32).at[order].set(first_tiles[ordered] * config.rows + rank)
    result = products[result_row]
    if activation is not None:
        gate, up = jnp.split(result.astype(jnp.float32), 2, axis=-1)
        result = (activation(gate).astype(x.dtype).astype(jnp.float32) * up).astype(x.dtype)
    return result.reshape(*chosen.shape, -1)


def _before(counts: Int[Array, " groups"]) -> Int[Array, " groups"]:
    """The sum of all counts before each."""
    return (jnp.cumsum(counts) - counts).astype(jnp.int32)
