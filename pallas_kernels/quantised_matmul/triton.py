"""Quantised matmul of few rows as Pallas Triton kernels: the weight is read once, at the speed of the memory.

One program makes a tile of outputs for all rows from one share of the inputs (splits put more programs to work than
there are tiles; XLA adds them in order and fuses that with what follows).

    grid (output tiles, splits)     for each block of 128 inputs of the split:
      w4   words [32, TILE] int16 -> 4 planes of bf16 128 + nibble -> 4 dots with x [rows, 32] -> scale, add
      w8   values [TILE, 128] int8 -> bf16 -> dot with x [rows, 128] -> add; scale at the end

A nibble n becomes the bf16 number 128 + n by OR with 0x4300, two nibbles an instruction; the 136 that is too much
(128, and the 8 that a nibble is off by) goes out through the sum of x over the plane's inputs. Rows never mix, and the
tile of rows is a multiple of 16: a row's bits do not depend on the others.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.quantised_matmul.weights import BLOCK, W4, W8, Weight

MOST_ROWS = 64
"""Beyond it a dense weight and the big matmul are faster."""
_TILES = (128, 64, 32)
_ROW_TILE = 16
_PROGRAMS = 396
"""Programs to aim at: three for each of an H100's 132 multiprocessors."""
_OFFSET = 136.0
_PLANE = BLOCK // 4


def matmul(x: Float[Array, "... K"], weight: Weight, *, interpret: bool = False) -> Float[Array, "... N"]:
    """`x @ weight.T` in the dtype of x, bf16. Raises NotImplementedError for what the kernels do not take."""
    if not isinstance(weight, W4 | W8):
        raise NotImplementedError(f"matmul on Triton takes W4 and W8 weights, got {type(weight).__name__}")
    rows = x.reshape(-1, x.shape[-1])
    reason = why_not(rows.shape[0], x.dtype, weight)
    if reason:
        raise NotImplementedError(f"matmul on Triton {reason}")
    count, columns = rows.shape
    padded_rows = -(-count // _ROW_TILE) * _ROW_TILE
    padded_rows = 1 << (padded_rows - 1).bit_length()
    blocks = -(-columns // BLOCK)
    rows = jnp.pad(rows, ((0, padded_rows - count), (0, blocks * BLOCK - columns)))
    if isinstance(weight, W4):
        product = _run_w4(rows, weight, blocks, interpret)
    else:
        product = _run_w8(rows, weight, blocks, interpret)
    return product[:count].astype(x.dtype).reshape(*x.shape[:-1], -1)


def why_not(rows: int, dtype: Any, weight: W4 | W8) -> str | None:
    """What the kernels cannot take about these arguments, as the end of a sentence; None when they can."""
    outputs = weight.scales.shape[-1]
    if rows > MOST_ROWS:
        return f"takes {MOST_ROWS} rows at most, got {rows}"
    if dtype != jnp.bfloat16:
        return f"takes bf16 rows, got {dtype}"
    if outputs % _TILES[-1]:
        return f"takes a multiple of {_TILES[-1]} outputs, got {outputs}"
    if isinstance(weight, W8) and weight.values.shape[1] % 32:
        return f"takes a multiple of 32 inputs, got {weight.values.shape[1]}"
    return None


def _run_w4(rows: Array, weight: W4, blocks: int, interpret: bool) -> Float[Array, "rows N"]:
    outputs = weight.packed.shape[1]
    tile = next(tile for tile in _TILES if outputs % tile == 0)
    splits = _splits(outputs // tile, blocks)
    planes = 1 if weight.group_size == BLOCK else 4
    # [blocks * planes, rows]: what the offset adds up to, per scale
    sums = rows.astype(jnp.float32).reshape(len(rows), blocks * planes, BLOCK // planes).sum(-1).T * _OFFSET
    kernel = functools.partial(_w4_kernel, tile=tile, blocks=blocks, splits=splits, planes=planes, interpret=interpret)
    parts = _call(kernel, (outputs // tile, splits), (splits, len(rows), outputs), interpret, "w4_matmul")(
        rows, sums, weight.packed, weight.scales
    )
    return jnp.sum(parts, axis=0)


def _run_w8(rows: Array, weight: W8, blocks: int, interpret: bool) -> Float[Array, "rows N"]:
    outputs, columns = weight.values.shape
    tile = next(tile for tile in _TILES if outputs % tile == 0)
    splits = _splits(outputs // tile, blocks)
    kernel = functools.partial(_w8_kernel, tile=tile, blocks=blocks, splits=splits, columns=columns)
    parts = _call(kernel, (outputs // tile, splits), (splits, outputs, len(rows)), interpret, "w8_matmul")(
        rows.T, weight.values
    )
    return (jnp.sum(parts, axis=0) * weight.scales[:, None]).T


def _call(kernel: Any, grid: tuple[int, int], shape: tuple[int, ...], interpret: bool, name: str) -> Any:
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    number = 4 if name == "w4_matmul" else 2
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * number,
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name=name,
    )


def _splits(tiles: int, blocks: int) -> int:
    """The fewest shares of the inputs with which there are programs enough; at least two blocks each."""
    wanted = max(1, min(-(-_PROGRAMS // tiles), blocks // 2))
    return next((count for count in range(wanted, blocks + 1) if blocks % count == 0), 1)


def _w4_kernel(
    x_ref,
    sums_ref,
    words_ref,
    scales_ref,
    out_ref,
    *,
    tile: int,
    blocks: int,
    splits: int,
    planes: int,
    interpret: bool,
) -> None:
    column, split = pl.program_id(0), pl.program_id(1)
    outputs = pl.ds(column * tile, tile)
    share = blocks // splits
    rows = x_ref.shape[0]

    def visit(number, total):
        block = split * share + number
        words = plt.load(words_ref.at[pl.ds(block * _PLANE, _PLANE), outputs])
        part = jnp.zeros((rows, tile), jnp.float32)
        for plane in range(4):
            x = plt.load(x_ref.at[:, pl.ds(block * BLOCK + plane * _PLANE, _PLANE)])
            product = plt.dot(x, _plane(words, plane, interpret))
            if planes == 4:
                total += _scaled(product, sums_ref, scales_ref, block * 4 + plane, outputs)
            else:
                part += product
        return total if planes == 4 else total + _scaled(part, sums_ref, scales_ref, block, outputs)

    total = jax.lax.fori_loop(0, share, visit, jnp.zeros((rows, tile), jnp.float32))
    plt.store(out_ref.at[split, :, outputs], total)


def _scaled(product, sums_ref, scales_ref, group, outputs):
    scales = plt.load(scales_ref.at[group, outputs]).astype(jnp.float32)
    sums = plt.load(sums_ref.at[group, :])
    return (product - sums[:, None]) * scales[None, :]


def _plane(words, plane: int, interpret: bool):
    """The plane's nibbles as bf16 128 + n, bf16[32, tile]."""
    if interpret:
        nibbles = jax.lax.shift_right_logical(words, jnp.int16(4 * plane)) & jnp.int16(15)
        return nibbles.astype(jnp.bfloat16) + jnp.bfloat16(128)
    assembly = f"{{ .reg .b32 t; shr.b32 t, $1, {4 * plane}; lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA; }}"
    shape = jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)
    return plt.elementwise_inline_asm(assembly, args=[words], constraints="=r,r", pack=2, result_shape_dtypes=[shape])[
        0
    ]


def _w8_kernel(x_ref, values_ref, out_ref, *, tile: int, blocks: int, splits: int, columns: int) -> None:
    column, split = pl.program_id(0), pl.program_id(1)
    outputs = pl.ds(column * tile, tile)
    share = blocks // splits
    rows = x_ref.shape[1]

    def visit(number, total):
        start = (split * share + number) * BLOCK
        inputs = pl.ds(start, BLOCK)
        inside = start + jax.lax.broadcasted_iota(jnp.int32, (tile, BLOCK), 1) < columns
        mask = {} if columns % BLOCK == 0 else {"mask": inside, "other": jnp.int8(0)}
        values = plt.load(values_ref.at[outputs, inputs], **mask).astype(jnp.bfloat16)
        return total + plt.dot(values, plt.load(x_ref.at[inputs, :]))

    total = jax.lax.fori_loop(0, share, visit, jnp.zeros((tile, rows), jnp.float32))
    plt.store(out_ref.at[split, outputs, :], total)
