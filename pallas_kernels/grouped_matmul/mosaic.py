"""Rows of a chunk times the 4-bit matrices of the groups that they chose, on Hopper cards: tile by tile of a group.

XLA counts the choices and copies the rows that they stand for side by side, each group's from a multiple of 8 on. What
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

from pallas_kernels.quantised_matmul import mosaic
from pallas_kernels.quantised_matmul.mosaic import OUTPUTS, Config, Groups, tile_products
from pallas_kernels.quantised_matmul.weights import W4, Weight, outputs_of, padded_inputs

_ALIGNED = 8
"""Rows that copies to shared memory take together."""
_PART = 128
"""Choices that are compared with each other."""
_ROWS = (64, 96, 128, 176, 256)
"""Of a tile."""
_OF_STEPS = 1024
"""Choices of 64 rows of 16 each: steps and blocks keep one kernel, and with it a row's bits."""
_FEWEST = 32
"""Rows of a group, in the mean. With 64 it takes 0.5 of Triton's time, with 8 1.1 to 1.2 (H100)."""
_SLACK = 1.25
"""Rows that a tile has room for, over those of a group in the mean: most groups have one tile."""


def why_not(choices: int, dtype: Any, weight: Weight, *, groups: int) -> str | None:
    """What the kernel cannot take about these arguments, as the end of a sentence; None when it can."""
    if choices <= _OF_STEPS or choices < _FEWEST * groups:
        return f"takes more than {_OF_STEPS} choices and {_FEWEST} for each group, got {choices}"
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
    values, place = products(x, weight, chosen, groups=groups, config=config, interpret=interpret)
    result = values[place]
    if activation is not None:
        gate, up = jnp.split(result.astype(jnp.float32), 2, axis=-1)
        result = (activation(gate).astype(x.dtype).astype(jnp.float32) * up).astype(x.dtype)
    return result.reshape(*chosen.shape, -1)


def products(
    x: Float[Array, "R K"],
    weight: Weight,
    chosen: Int[Array, "R A"],
    *,
    groups: int,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "places N"], Int[Array, " choices"]]:
    """See `api.grouped_products`. Raises NotImplementedError for what `why_not` names, ValueError for splits."""
    reason = why_not(chosen.size, x.dtype, weight, groups=groups)
    if not isinstance(weight, W4) or reason:
        raise NotImplementedError(f"grouped_matmul on Mosaic {reason}")
    config = config or config_for(chosen.size, groups)
    if config.splits > 1:
        raise ValueError(f"tiles of groups are made whole, got {config}")
    return _products(x, weight, chosen, groups, config, interpret)


@functools.partial(jax.jit, static_argnames=("groups", "config", "interpret"))
def _products(
    x: Array, weight: W4, chosen: Array, groups: int, config: Config, interpret: bool
) -> tuple[Float[Array, "places N"], Int[Array, " choices"]]:
    choices, active = chosen.size, chosen.shape[1]
    group = jnp.clip(chosen.reshape(-1), 0, groups - 1)
    rank, counts = _ranks(group, groups)
    first_rows, tiles = _before(-(-counts // _ALIGNED) * _ALIGNED), -(-counts // config.rows)
    first_tiles = _before(tiles)

    # The last group's last tile reads behind its rows.
    room = -(-choices // _ALIGNED) * _ALIGNED + _ALIGNED * groups + config.rows
    row = jnp.arange(choices, dtype=jnp.int32) // active
    source = jnp.zeros(room, jnp.int32).at[first_rows[group] + rank].set(row)
    rows = jnp.pad(x, ((0, 0), (0, padded_inputs(weight) - x.shape[1])))[source]

    outputs, tile = outputs_of(weight) // groups, jnp.arange(groups + choices // config.rows, dtype=jnp.int32)
    of_tile = jnp.sum(first_tiles[None] <= tile[:, None], axis=1, dtype=jnp.int32) - 1
    places = Groups(
        first_row=first_rows[of_tile] + (tile - first_tiles[of_tile]) * config.rows,
        first_output=of_tile * outputs,
        tiles=jnp.sum(tiles, keepdims=True),
        outputs=outputs,
    )
    values = tile_products(rows, weight, config, groups=places, interpret=interpret)
    return values, first_tiles[group] * config.rows + rank


def _ranks(chosen: Int[Array, " choices"], groups: int) -> tuple[Int[Array, " choices"], Int[Array, " groups"]]:
    """How many choices before each are of the same group, and how many each group has.

    Counted in parts of the list, and then over all parts: no sort.
    """
    parts = jnp.pad(chosen, (0, -len(chosen) % _PART), constant_values=groups).reshape(-1, _PART)
    alike = parts[:, :, None] == parts[:, None, :]
    in_part = jnp.sum(jnp.tril(alike, -1), axis=-1, dtype=jnp.int32)
    of_parts = jnp.sum(parts[:, :, None] == jnp.arange(groups)[None, None], axis=1, dtype=jnp.int32)
    earlier = jnp.tri(len(parts), k=-1, dtype=jnp.bool)
    before = jnp.sum(jnp.where(earlier[:, :, None], of_parts[None], 0), axis=1)
    ranks = in_part + jnp.take_along_axis(before, parts, axis=1, mode="clip")
    return ranks.reshape(-1)[: len(chosen)], jnp.sum(of_parts, axis=0)


def _before(counts: Int[Array, " groups"]) -> Int[Array, " groups"]:
    """The sum of all counts before each."""
    return (jnp.cumsum(counts) - counts).astype(jnp.int32)
