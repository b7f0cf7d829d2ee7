"""Products of many rows with 4-bit weights as a Pallas Mosaic GPU kernel: chunks of prompts on Hopper cards.

A program makes a tile of outputs for a tile of rows. The matrix instruction takes its left side from registers, so
weights go there from their words and exist as numbers of 16 bits nowhere else: what is summed up is the transposed
product, `weight [outputs, inputs] @ x.T [inputs, rows]`.

    grid (programs, one for each multiprocessor), tile after tile
      warpgroup 0, 1   64 outputs each: for each block of 128 inputs words -> weights of two nibble planes -> product
      warpgroup 2      copies: rows, words and scales of a block (some slots of memory ahead), and results

Words are read transposed, so that a register has two of them, of inputs side by side, and a plane of these is two
numbers of bf16 after a shift, an `and` and a multiply-add, as in triton.py. While two planes are multiplied the next
two are made. Tiles that are left when all programs have had the same number may be split: several programs each make
the sum of a share of the inputs, and XLA adds these up.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.hopper import LINES, most_programs
from pallas_kernels.quantised_matmul.triton import PLANE, UNIT_W4, assembly_of_plane, factors_of_plane, few_rows
from pallas_kernels.quantised_matmul.weights import BLOCK, W4, Weight, padded_inputs

_PLANES = 2
"""Multiplied together: 64 inputs, what the matrix instruction's memory layout wants."""
OUTPUTS = 2 * LINES
"""Of a tile."""
_ROWS = (256, 176, 128)
"""Of a tile; what is fastest follows from how many tiles there are."""
_SPLITS = (1, 2, 3, 4, 5, 6)
_MEMORY = 227 * 1024 - 256
"""Bytes of shared memory that slots may take; the rest is for barriers."""
_BLOCK, _ROW, _MEGABYTE_OF_SUMS, _MEGABYTE = 0.19, 0.00494, 1.0, 0.4
"""Microseconds of an H100: a block of inputs takes the first and for each row the second, sums of shares are written
and added up in the third, padded rows and their results are copied in the last."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a matmul is cut into programs.

    rows    of a tile
    splits  shares of the inputs, for tiles that are too few for all programs; the last share may be smaller
    """

    rows: int
    splits: int = 1

    def split_tiles(self, tiles: int) -> int:
        """How many of so many tiles are made in shares."""
        return tiles % most_programs() if self.splits > 1 else 0

    def programs(self, tiles: int) -> int:
        """How many there are for so many tiles: all have whole ones, or each has a share at most."""
        split_tiles = self.split_tiles(tiles)
        return max(min(most_programs(), tiles - split_tiles), split_tiles * self.splits)

    def refusal(self, row_tiles: int, output_tiles: int, blocks: int) -> str | None:
        """Why it cannot be had, as the end of a sentence; None if it can."""
        if (self.splits - 1) * -(-blocks // self.splits) >= blocks:
            return f"does not divide {blocks} blocks of {BLOCK} inputs"
        split_tiles = self.split_tiles(row_tiles * output_tiles)
        if split_tiles * self.splits > most_programs() or split_tiles % row_tiles:
            tiles = f"{split_tiles} of {row_tiles} x {output_tiles} tiles"
            return f"does not deal shares of {tiles} out to {most_programs()} programs"
        return None


def why_not(rows: int, dtype: Any, weight: Any) -> str | None:
    """What the kernel cannot take about these arguments, as the end of a sentence; None when it can."""
    if jax.__version_info__ < (0, 11):  # which loads nothing transposed
        return f"takes jax 0.11 or later, got {jax.__version__}"
    if not isinstance(weight, W4):
        return f"takes w4 weights, got {type(weight).__name__}"
    if few_rows(rows):
        return f"takes more rows than a step has, got {rows}"
    if dtype != jnp.bfloat16:
        return f"takes bf16 rows, got {dtype}"
    outputs = weight.packed.shape[1]
    return f"takes a multiple of {OUTPUTS} outputs, got {outputs}" if outputs % OUTPUTS else None


def config_for(rows: int, outputs: int, blocks: int) -> Config:
    """What takes least: a round in which some programs have a tile takes as long as one in which all have one.

    Of those in bench/results/h100-chunk-matmul.json it takes the fastest, or one that needs 7 % more at most.
    """

    def microseconds(config: Config) -> float:
        tiles = -(-rows // config.rows) * (outputs // OUTPUTS)
        split_tiles = config.split_tiles(tiles)
        visits = -(-(tiles - split_tiles) // most_programs()) * blocks
        visits += -(-blocks // config.splits) if split_tiles else 0
        sums = split_tiles * config.splits * config.rows * OUTPUTS * 4
        padding = 4 * rows * (blocks * BLOCK + outputs) if rows % config.rows else 0
        return visits * (_BLOCK + _ROW * config.rows) + _MEGABYTE_OF_SUMS * sums / 1e6 + _MEGABYTE * padding / 1e6

    options = (Config(*option) for option in itertools.product(_ROWS, _SPLITS))
    fitting = [each for each in options if each.refusal(-(-rows // each.rows), outputs // OUTPUTS, blocks) is None]
    return min(fitting, key=microseconds)


def matmul(
    x: Float[Array, "... K"], weight: Weight, *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "... N"]:
    """`x @ weight.T` in bf16. Raises NotImplementedError for what `why_not` names.

    Without a config, that of `config_for`. Raises ValueError for one that cannot be had.
    """
    rows = x.reshape(-1, x.shape[-1])
    reason = why_not(len(rows), x.dtype, weight)
    if not isinstance(weight, W4) or reason:
        raise NotImplementedError(f"matmul on Mosaic {reason}")
    outputs, blocks = weight.packed.shape[1], padded_inputs(weight) // BLOCK
    config = config or config_for(len(rows), outputs, blocks)
    if reason := config.refusal(-(-len(rows) // config.rows), outputs // OUTPUTS, blocks):
        raise ValueError(f"{config} {reason}")
    return _run(rows, weight, config, interpret).reshape(*x.shape[:-1], outputs)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _run(rows: Float[Array, "rows K"], weight: W4, config: Config, interpret: bool) -> Float[Array, "rows N"]:
    padding = -len(rows) % config.rows
    padded = jnp.pad(rows, ((0, padding), (0, padded_inputs(weight) - rows.shape[1])))
    return tile_products(padded, weight, config, interpret=interpret)[: len(rows)]


class Groups(NamedTuple):
    """Where row tiles find their rows, and the outputs that they are multiplied for: of one matrix of several.

    A tile's rows begin at a multiple of 8, its outputs at one of 128. Of the `tiles` first ones there are results.
    """

    first_row: Int[Array, " most_tiles"]
    first_output: Int[Array, " most_tiles"]
    tiles: Int[Array, " 1"]
    outputs: int


def tile_products(
    rows: Float[Array, "rows K"], weight: W4, config: Config, *, groups: Groups | None = None, interpret: bool
) -> Float[Array, "tile_rows N"]:
    """Products of whole tiles: there are as many rows as all need, and as many columns as words stand for."""
    row_tiles = len(rows) // config.rows if groups is None else len(groups.first_row)
    outputs = weight.packed.shape[1] if groups is None else groups.outputs
    tiles = row_tiles * (outputs // OUTPUTS)
    split_tiles = config.split_tiles(tiles)
    scale_rows = BLOCK // weight.group_size
    slots = _MEMORY // (2 * (config.rows * BLOCK + (PLANE + scale_rows) * OUTPUTS))
    out_type = [jax.ShapeDtypeStruct((row_tiles * config.rows, outputs), jnp.bfloat16)]
    if split_tiles:
        out_type.append(jax.ShapeDtypeStruct((split_tiles * config.splits, OUTPUTS, config.rows), jnp.float32))
    run = plgpu.kernel(
        functools.partial(_kernel, config=config, grouped=groups is not None, interpret=interpret),
        out_type=out_type,
        grid=(config.programs(tiles),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            hopper.shared(slots, config.rows, BLOCK),
            hopper.shared(slots, PLANE, OUTPUTS, dtype=jnp.int16),
            plgpu.SMEM((slots, scale_rows, OUTPUTS), jnp.float16),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2),
        ],
        **hopper.how(interpret=interpret),
    )
    places = () if groups is None else (groups.first_row, groups.first_output, groups.tiles)
    result, *sums = run(rows, weight.packed, weight.scales, *places)
    if not split_tiles:
        return result
    of_tiles = jnp.sum(sums[0].reshape(-1, row_tiles, config.splits, OUTPUTS, config.rows), axis=2)
    last_columns = of_tiles.transpose(1, 3, 0, 2).reshape(len(result), -1).astype(result.dtype)
    if split_tiles == tiles:
        return last_columns
    return result.at[:, outputs - last_columns.shape[1] :].set(last_columns)


def _kernel(x_ref, words_ref, scales_ref, *refs, config: Config, grouped: bool, interpret: bool) -> None:
    """A slot of memory is `here` when its block has been copied, and `done` when no product reads it any more.

    A tile's result stands in the slot of its last block, which is done when the result is there: before the slot is
    copied to again, the result is copied away.
    """
    *others, x, words, scales, here, done, multiplied = refs
    places, (out_ref, *sums_refs) = (others[:3], others[3:]) if grouped else ([], others)
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    (slots, scale_rows), blocks = scales.shape[:2], words_ref.shape[0] // PLANE
    row_tiles, output_tiles = out_ref.shape[0] // config.rows, out_ref.shape[1] // OUTPUTS
    tiles = row_tiles * output_tiles
    split_tiles, programs = config.split_tiles(tiles), config.programs(tiles)
    whole_tiles = places[2][0] * output_tiles if grouped else jnp.int32(tiles - split_tiles)
    own_tiles = jax.lax.div(whole_tiles + (programs - 1) - program, jnp.int32(programs))
    share = -(-blocks // config.splits)
    first = jax.lax.rem(program, jnp.int32(config.splits)) * share
    has_share = program < split_tiles * config.splits
    visits = own_tiles * blocks + jnp.where(has_share, jnp.minimum(share, blocks - first), 0)

    def tile_of(number: Array) -> tuple[Array, Array]:
        """Numbers of its rows and its outputs. Programs side by side read the same of what there is more of."""
        tile = program + number * programs
        if split_tiles:
            of_share = whole_tiles + jax.lax.div(program, jnp.int32(config.splits))
            tile = jnp.where(number < own_tiles, tile, of_share)
        if grouped:
            return jax.lax.div(tile, output_tiles), jax.lax.rem(tile, output_tiles)
        return jax.lax.rem(tile, row_tiles), jax.lax.div(tile, row_tiles)

    @pl.when(warpgroup < 2)
    def _compute() -> None:
        if not interpret:
            plgpu.set_max_registers(240, action="increase")
        lines = pl.ds(warpgroup * LINES, LINES)
        for number in range(slots - 1):  # the last one is released in the first turn, as by the turn before
            plgpu.barrier_arrive(done.at[number])

        def weights_of(slot: Array, planes: Sequence[int]) -> Array:
            of_lines = words.at[slot, :, lines]
            of_planes = [scales.at[slot, plane if scale_rows > 1 else 0, lines] for plane in planes]
            if interpret:
                return _interpreted_weights(of_lines[...].T, [scale[...] for scale in of_planes], planes)
            load: Any = plgpu.load  # jax 0.10 has another signature
            by_line = plgpu.Layout.WGMMA.reduce(1)
            loaded = [load(scale, layout=by_line, optimized=False) for scale in of_planes]
            return _weights(load(of_lines.T, layout=plgpu.Layout.WGMMA), loaded, planes)

        def add_up(number: Array, _: None) -> None:
            def multiply(total_ref):
                def visit(turn: Array, total: Array | None) -> Array | None:
                    slot = jax.lax.rem(turn, slots)
                    plgpu.barrier_wait(here.at[slot])
                    for plane in range(0, 4, _PLANES):
                        if not interpret:  # what is made now stands where the product before last had its weights
                            plgpu.wgmma_wait(1)
                        if plane > 0:
                            plgpu.barrier_arrive(done.at[jax.lax.rem(turn + (slots - 1), slots)])
                        weights = weights_of(slot, range(plane, plane + _PLANES))
                        columns = pl.ds(plane * PLANE, _PLANES * PLANE)
                        if total is None:
                            plgpu.wgmma(total_ref, weights, x.at[slot, :, columns].T)
                        else:
                            total += jnp.dot(weights, x[slot, :, columns].astype(jnp.float32).T)
                    return total

                zeros = jnp.zeros((LINES, config.rows), jnp.float32)
                turns = number * blocks, jnp.minimum((number + 1) * blocks, visits)
                total = jax.lax.fori_loop(*turns, visit, zeros if interpret else None)
                if total is None:
                    plgpu.wgmma_wait(0)
                    total = total_ref[...]
                return total

            total = pl.run_scoped(multiply, ACC((LINES, config.rows), jnp.float32)) * UNIT_W4
            if split_tiles:

                @pl.when(number == own_tiles)
                def _sum() -> None:
                    sums_refs[0][program, lines] = total

            @pl.when(number < own_tiles)
            def _result() -> None:
                plgpu.barrier_arrive(multiplied)
                plgpu.barrier_wait(multiplied)  # neither warpgroup reads the last block's rows any more
                result = x.at[jax.lax.rem((number + 1) * blocks - 1, slots), :, lines]
                if interpret:
                    result[...] = total.T.astype(jnp.bfloat16)
                else:
                    result.T[...] = total.astype(jnp.bfloat16)
                plgpu.commit_smem()

        jax.lax.fori_loop(0, own_tiles + has_share.astype(jnp.int32), add_up, None)
        plgpu.barrier_arrive(done.at[jax.lax.rem(visits + (slots - 1), slots)])

    @pl.when(warpgroup == 2)
    def _copy() -> None:
        if not interpret:
            plgpu.set_max_registers(24, action="decrease")

        def copy(turn: Array, _: None) -> None:
            slot, before = jax.lax.rem(turn, slots), turn - slots
            plgpu.barrier_wait(done.at[slot])  # after the last turns too: nobody leaves before all has been read
            ended = jax.lax.div(before, blocks)

            @pl.when((before >= 0) & (ended < own_tiles) & (jax.lax.rem(before + 1, blocks) == 0))
            def _result() -> None:
                row_tile, output_tile = tile_of(ended)
                rows = pl.ds(row_tile * config.rows, config.rows)
                plgpu.copy_smem_to_gmem(x.at[slot], out_ref.at[rows, pl.ds(output_tile * OUTPUTS, OUTPUTS)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(turn < visits)
            def _block() -> None:
                number = jax.lax.div(turn, blocks)
                row_tile, output_tile = tile_of(number)
                block = jax.lax.rem(turn, blocks) + jnp.where(number < own_tiles, 0, first)
                first_row, first_output = row_tile * config.rows, output_tile * OUTPUTS
                if grouped:
                    first_row = pl.multiple_of(places[0][row_tile], 8)
                    first_output = pl.multiple_of(places[1][row_tile] + first_output, OUTPUTS)
                for source, target in (
                    (x_ref.at[pl.ds(first_row, config.rows), pl.ds(block * BLOCK, BLOCK)], x),
                    (words_ref.at[pl.ds(block * PLANE, PLANE), pl.ds(first_output, OUTPUTS)], words),
                    (scales_ref.at[pl.ds(block * scale_rows, scale_rows), pl.ds(first_output, OUTPUTS)], scales),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], here.at[slot])

        jax.lax.fori_loop(0, visits + slots, copy, None)
        plgpu.wait_smem_to_gmem(0)


def _weights(words: Array, scales: Sequence[Array], planes: Sequence[int]) -> Array:
    """Weights bf16[64, 64] of two planes, in units of UNIT_W4, from words [64, 32] and the scales of 64 outputs."""
    factors = []
    for scale, plane in zip(scales, planes, strict=True):
        pair = factors_of_plane(scale.astype(jnp.bfloat16), plane)
        factors += [jax.lax.broadcast_in_dim(factor, words.shape, [0]) for factor in pair]
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct((words.shape[0], len(planes) * words.shape[1]), jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * (1 + len(factors)), return_type=result)
    def make(_: Any, words: Any, *factors: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        word, pair = ir.VectorType.get((1,), i32), ir.VectorType.get((2,), ir.BF16Type.get())

        def bits_of(register: Any) -> Any:
            return vector.extract(vector.bitcast(word, register), dynamic_position=[], static_position=[0])

        made = []
        for plane, lift, less in zip(planes, factors[::2], factors[1::2], strict=True):
            registers = np.empty_like(words.registers)
            for at, register in np.ndenumerate(words.registers):
                operands = [bits_of(each) for each in (register, lift.registers[at], less.registers[at])]
                # Side effects keep it behind the wait for the product that may still read these registers.
                bits: Any = llvm.inline_asm(i32, operands, assembly_of_plane(plane), "=r,r,r,r", has_side_effects=True)
                registers[at] = vector.bitcast(pair, vector.broadcast(word, bits))
            made.append(registers)
        return mgpu.FragmentedArray(_registers=np.concatenate(made, axis=1), _layout=words.layout, _is_signed=None)

    return make(words, *factors)


def _interpreted_weights(words: Array, scales: Sequence[Array], planes: Sequence[int]) -> Array:
    """The same, f32, for CPUs, which take subnormal numbers for zero."""
    made = []
    for scale, plane in zip(scales, planes, strict=True):
        nibbles = jax.lax.shift_right_logical(words, jnp.int16(4 * plane)) & jnp.int16(15)
        rounded = scale.astype(jnp.bfloat16).astype(jnp.float32)[:, None]
        weights = (nibbles - jnp.int16(8)).astype(jnp.float32) * rounded
        made.append(weights.astype(jnp.bfloat16).astype(jnp.float32) / UNIT_W4)
    return jnp.concatenate(made, axis=1)
