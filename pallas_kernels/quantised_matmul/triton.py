"""Linear maps as Pallas Triton kernels: made for few rows, where the weight is read at the speed of the memory.

One program makes a tile of outputs for up to 64 rows from one share of the inputs (splits put more programs to work
than there are tiles; what follows adds them up in order). Weights of w4 take any number of rows: tiles of 64 that read
the same weights run side by side, and share them in the cache.

    grid (row tiles, output tiles, splits)     for each block of inputs of the split:
      w4      words [32, TILE] int16 -> 4 planes of weights bf16 [32, TILE] -> 4 dots with x [rows, 32] -> add
      w8      values [TILE, 128] int8 -> bf16 -> dot with x [rows, 128] -> add; scale at the end
      dense   values [TILE, 128] bf16 -> dot with x [rows, 128] -> add

A nibble n that stands alone in 16 bits is a bf16 number already, the subnormal one n * 2**-133 (n * 2**-129 for the
upper nibble of a byte), so that one fused multiply-add makes weights of two: with the scale times a power of two that
lifts it among the normal numbers, less 8 times the scale. Sums are 2**-23 of what they stand for until the end. The
scale is rounded from f16 to bf16: a weight is off by 2**-8 of itself at most, little beside what 4 bits cost. Rows
never mix, and the tile of rows is a multiple of 16: a row's bits do not depend on the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.quantised_matmul.weights import BLOCK, W4, W8, Weight, outputs_of
from pallas_kernels.tuning import tuned

TUNED = Path(__file__).with_name("tuned.json")
_MOST_ROWS = 64
"""Of a tile; weights that lie row by row have one."""
_TILES = (128, 64, 32)
_BLOCKS = (128, 64, 32)
"""Inputs that a program looks at together, of weights that lie row by row."""
_ROW_TILE = 16
_PROGRAMS, _PROGRAMS_W4 = 396, 198
"""Programs to aim at: three for each of an H100's 132 multiprocessors, or one and a half of w4."""
PLANE = BLOCK // 4
"""Inputs of a nibble plane, and rows of words of a block."""
_SUBNORMAL = 133
"""The last bit of a subnormal bf16 number counts 2**-133."""
_SMALLER = 23
"""Weights are made so many powers of two smaller: times 2**110 the largest scale is still a number of bf16."""
UNIT_W4 = 2.0**_SMALLER
"""What a sum of w4 products must be multiplied with."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a matmul is cut into programs.

    tile     outputs of a program
    splits   shares of the inputs; the last one may be smaller than the others
    """

    tile: int
    splits: int
    warps: int = 4
    stages: int = 4

    def divides(self, outputs: int, blocks: int) -> bool:
        """Whether every program has something to do."""
        return outputs % self.tile == 0 and (self.splits - 1) * -(-blocks // self.splits) < blocks


def matmul(
    x: Float[Array, "... K"], weight: Weight, *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "... N"]:
    """`x @ weight.T` in the dtype of x, bf16. Raises NotImplementedError for what the kernels do not take."""
    return jnp.sum(matmul_parts(x, weight, config=config, interpret=interpret), axis=0).astype(x.dtype)


def matmul_parts(
    x: Float[Array, "... K"], weight: Weight, *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "parts ... N"]:
    """What adds up to `x @ weight.T`, in f32. Raises NotImplementedError for what the kernels do not take.

    Without a config, that of `config_for`. Raises ValueError for one that leaves outputs or inputs out.
    """
    rows = x.reshape(-1, x.shape[-1])
    reason = why_not(rows.shape[0], x.dtype, weight)
    if reason:
        raise NotImplementedError(f"matmul on Triton {reason}")
    count, columns = rows.shape
    padded_rows = max(_ROW_TILE, 1 << (count - 1).bit_length())
    if not few_rows(count):
        padded_rows = -(-count // _MOST_ROWS) * _MOST_ROWS
    block, blocks = blocks_of(weight, columns)
    config = config or config_for(weight, columns, count)
    if not config.divides(outputs_of(weight), blocks):
        raise ValueError(f"{config} does not divide {outputs_of(weight)} outputs and {blocks} blocks of {block} inputs")
    rows = jnp.pad(rows, ((0, padded_rows - count), (0, blocks * block - columns)))
    run = _run_w4 if isinstance(weight, W4) else _run_rows
    parts = run(rows, weight, config, interpret)
    return parts[:, :count].reshape(-1, *x.shape[:-1], parts.shape[-1])


def why_not(rows: int, dtype: Any, weight: Weight) -> str | None:
    """What the kernels cannot take about these arguments, as the end of a sentence; None when they can."""
    outputs = outputs_of(weight)
    if not few_rows(rows) and not isinstance(weight, W4):
        return f"takes more than {_MOST_ROWS} rows of w4 only, got {rows}: the big matmul is faster"
    if dtype != jnp.bfloat16:
        return f"takes bf16 rows, got {dtype}"
    if outputs % _TILES[-1]:
        return f"takes a multiple of {_TILES[-1]} outputs, got {outputs}"
    if isinstance(weight, W8) and weight.values.shape[1] % _BLOCKS[-1]:
        return f"takes a multiple of {_BLOCKS[-1]} inputs, got {weight.values.shape[1]}"
    if not isinstance(weight, W4 | W8) and (weight.dtype != jnp.bfloat16 or weight.shape[1] % _BLOCKS[-1]):
        return f"takes dense weights of bf16 with a multiple of {_BLOCKS[-1]} inputs, got {weight.dtype}{weight.shape}"
    return None


def few_rows(rows: int) -> bool:
    """Whether rows are few enough for the weight to be all that counts, as in a step."""
    return rows <= _MOST_ROWS


def blocks_of(weight: Weight, columns: int) -> tuple[int, int]:
    """Inputs that a program looks at together, and how many such blocks there are."""
    block = BLOCK if isinstance(weight, W4) else next(block for block in _BLOCKS if columns % block == 0)
    return block, -(-columns // block)


def key(weight: Weight, inputs: int) -> str:
    """What tuned.json calls a shape."""
    name = f"w4 by {weight.group_size}" if isinstance(weight, W4) else "w8" if isinstance(weight, W8) else "bf16"
    return f"{name}, {inputs} -> {outputs_of(weight)}"


def config_for(weight: Weight, columns: int, rows: int) -> Config:
    """That of tuned.json for this device and shape, or the rule's. Many rows are programs enough without splits."""
    block, blocks = blocks_of(weight, columns)
    if not few_rows(rows):
        tile = next(tile for tile in _TILES if outputs_of(weight) % tile == 0)
        return Config(tile, 1, warps_of(tile))
    known = tuned(TUNED, key(weight, blocks * block))
    return Config(**known) if known else rule(weight, columns)


def rule(weight: Weight, columns: int) -> Config:
    """One that puts enough programs to work: what was fastest on an H100 for many shapes of w4, and for four of w8."""
    _, blocks = blocks_of(weight, columns)
    outputs, four = outputs_of(weight), isinstance(weight, W4)
    tile = next(tile for tile in (_TILES if four else _TILES[1:]) if outputs % tile == 0)
    # As many shares of the inputs as there are programs enough; two blocks each, but for the last.
    wanted = max(1, min(-(-(_PROGRAMS_W4 if four else _PROGRAMS) // (outputs // tile)), blocks // 2))
    splits, stages = -(-blocks // -(-blocks // wanted)), 3 if isinstance(weight, W8) else 4
    return Config(tile, splits, warps_of(tile) if four else 4, stages)


def warps_of(tile: int) -> int:
    """For w4: a warp takes 64 outputs or 16. With 32 the loop takes 1.3 to 2.5 times as long."""
    return tile // 64 or tile // 16


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _run_w4(rows: Array, weight: W4, config: Config, interpret: bool) -> Float[Array, "parts rows N"]:
    outputs = weight.packed.shape[1]
    kernel = functools.partial(
        _w4_kernel,
        tile=config.tile,
        blocks=rows.shape[1] // BLOCK,
        splits=config.splits,
        per_plane=weight.group_size != BLOCK,
        interpret=interpret,
    )
    return _call(kernel, 3, len(rows), outputs, config, interpret, "w4_matmul")(rows, weight.packed, weight.scales)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _run_rows(rows: Array, weight: W8 | Array, config: Config, interpret: bool) -> Float[Array, "parts rows N"]:
    """A weight that lies row by row: dense or w8."""
    values, *scales = (weight.values, weight.scales) if isinstance(weight, W8) else (weight,)
    block, blocks = blocks_of(weight, rows.shape[1])
    kernel = functools.partial(_rows_kernel, tile=config.tile, blocks=blocks, splits=config.splits, block=block)
    return _call(kernel, 2 + len(scales), len(rows), len(values), config, interpret, "rows_matmul")(
        rows, values, *scales
    )


def _call(kernel: Any, arguments: int, rows: int, outputs: int, config: Config, interpret: bool, name: str) -> Any:
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    return pl.pallas_call(
        kernel,
        grid=(-(-rows // _MOST_ROWS), outputs // config.tile, config.splits),
        in_specs=[whole] * arguments,
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((config.splits, rows, outputs), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name=name,
    )


def _w4_kernel(
    x_ref, words_ref, scales_ref, out_ref, *, tile: int, blocks: int, splits: int, per_plane: bool, interpret: bool
) -> None:
    column, split = pl.program_id(1), pl.program_id(2)
    outputs = pl.ds(column * tile, tile)
    first, count = _share(split, blocks, splits)
    at, tile_rows = _row_tile(x_ref)

    def visit(number, total):
        block = first + number

        def rows(plane):
            return plt.load(x_ref.at[at, pl.ds(block * BLOCK + plane * PLANE, PLANE)])

        return add_w4(total, rows, words_ref, scales_ref, block, outputs, per_plane=per_plane, interpret=interpret)

    total = jax.lax.fori_loop(0, count, visit, jnp.zeros((tile_rows, tile), jnp.float32))
    plt.store(out_ref.at[split, at, outputs], total * UNIT_W4)


def _row_tile(x_ref: Any) -> tuple[Any, int]:
    """Where a program's rows are, and how many: all of few rows."""
    rows = x_ref.shape[0]
    if few_rows(rows):
        return slice(None), rows
    return pl.ds(pl.program_id(0) * _MOST_ROWS, _MOST_ROWS), _MOST_ROWS


def _share(split: Any, blocks: int, splits: int) -> tuple[Any, Any]:
    """First block of a split's share, and how many it has: a constant if all have as many."""
    most = -(-blocks // splits)
    return split * most, most if blocks % splits == 0 else jnp.minimum(most, blocks - split * most)


def add_w4(
    total: Array,
    rows: Callable[[int], Array],
    words_ref: Any,
    scales_ref: Any,
    block: Array,
    outputs: Any,
    *,
    per_plane: bool,
    interpret: bool,
) -> Array:
    """Inside a kernel: `total` with the products of a block of inputs, in units of UNIT_W4; `rows` gives a plane's."""
    words = plt.load(words_ref.at[pl.ds(block * PLANE, PLANE), outputs])
    for plane in range(4):
        scales = plt.load(scales_ref.at[block * 4 + plane if per_plane else block, outputs]).astype(jnp.bfloat16)
        total += plt.dot(rows(plane), _plane(words, scales, plane, interpret))
    return total


def _plane(words, scales, plane: int, interpret: bool):
    """One plane's weights, bf16[32, tile], times 2**-_SMALLER."""
    if interpret:  # CPUs take subnormal numbers for zero
        nibbles = jax.lax.shift_right_logical(words, jnp.int16(4 * plane)) & jnp.int16(15)
        return (nibbles - jnp.int16(8)).astype(jnp.bfloat16) * (scales * jnp.bfloat16(2.0**-_SMALLER))[None, :]
    lift, less = (jnp.broadcast_to(each[None, :], words.shape) for each in factors_of_plane(scales, plane))
    shape = jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)
    return plt.elementwise_inline_asm(
        assembly_of_plane(plane), args=[words, lift, less], constraints="=r,r,r,r", pack=2, result_shape_dtypes=[shape]
    )[0]


def factors_of_plane(scales: Array, plane: int) -> tuple[Array, Array]:
    """What nibbles that stand alone, as numbers of bf16, are multiplied with, and what is added then."""
    lift = scales * jnp.bfloat16(2.0 ** (_SUBNORMAL - 4 * (plane % 2) - _SMALLER))
    return lift, scales * jnp.bfloat16(-8.0 * 2.0**-_SMALLER)


def assembly_of_plane(plane: int) -> str:
    """Two weights of a plane ($0) from two words ($1) and their factors ($2, $3)."""
    byte, upper = plane // 2, plane % 2
    return (
        f"{{ .reg .b32 t; shr.b32 t, $1, {8 * byte}; and.b32 t, t, {'0x00F000F0' if upper else '0x000F000F'}; "
        "fma.rn.bf16x2 $0, t, $2, $3; }"
    )


def _rows_kernel(x_ref, values_ref, *refs, tile: int, blocks: int, splits: int, block: int) -> None:
    *scales_refs, out_ref = refs
    column, split = pl.program_id(1), pl.program_id(2)
    outputs = pl.ds(column * tile, tile)
    first, count = _share(split, blocks, splits)

    def visit(number, total):
        inputs = pl.ds((first + number) * block, block)
        values = plt.load(values_ref.at[outputs, inputs]).astype(jnp.bfloat16)
        return total + plt.dot(plt.load(x_ref.at[:, inputs]), values, trans_b=True)

    total = jax.lax.fori_loop(0, count, visit, jnp.zeros((x_ref.shape[0], tile), jnp.float32))
    for scales_ref in scales_refs:
        total *= plt.load(scales_ref.at[outputs])[None, :]
    plt.store(out_ref.at[split, :, outputs], total)
