"""Block attention for chunks of a prompt as a Pallas Mosaic GPU kernel, for heads of 64 to 256 on Hopper cards.

A program takes lines of one slot and KV head (64 for each warpgroup that computes) and reads all keys that they see,
so there is nothing to put together afterwards. While a warpgroup takes exponentials of a block's scores, its weights of
the block before are multiplied with their values, and the other warpgroup's products run.

    grid (tiles from the last rows on, kv_heads, slots)
      warpgroup 0, 1 (, 2)   64 lines each: scores of a block -> running maximum and sum -> weights @ values
      the last warpgroup     copies: queries, blocks of keys and values (some slots ahead), the result

A line is a row of one head; a tile has the same rows of all heads of the group, one head behind the other. Where rows
do not divide into tiles, the last tile begins earlier: its first rows are computed twice, with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.block_attention.mosaic import interpreter
from pallas_kernels.online_softmax import LOWEST

LEAST_ROWS = 128
_LINES = 64
"""Lines of a warpgroup: what its matrix instruction takes."""
_LEAST_ROWS_OF_HEAD = 8
"""Shared memory is laid out in groups of so many lines."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    key_block   keys that a warpgroup looks at together
    slots       blocks of keys, and as many of values, that shared memory holds
    warpgroups  that compute, with 64 lines each
    take_turns  warpgroups issue their products one after the other
    """

    key_block: int
    slots: int
    warpgroups: int = 2
    take_turns: bool = True


def config_for(head_dim: int) -> Config:
    """What fits registers and shared memory."""
    if head_dim == 256:
        return Config(64, 2, take_turns=False)
    return Config(128, 3 if head_dim == 128 else 4)


@functools.partial(
    jax.jit, static_argnames=("page_size", "scale", "window", "causal", "ring", "compact", "config", "interpret")
)
def block_attention(
    queries: Float[Array, "B T H D"],
    key_pool: Float[Array, "tokens kv_heads D"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    tree: Ancestry | None = None,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    ring: bool = False,
    compact: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.block_attention`."""
    batch, rows, heads, head_dim = queries.shape
    kv_heads = key_pool.shape[1]
    group = heads // kv_heads
    config = config or config_for(head_dim)
    lines = config.warpgroups * _LINES
    tile_rows = min(lines // group, rows) // _LEAST_ROWS_OF_HEAD * _LEAST_ROWS_OF_HEAD
    tiles = -(-rows // tile_rows)
    tiling, swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    def shared(*sizes: int) -> Any:
        return plgpu.SMEM(sizes, jnp.bfloat16, transforms=(tiling, swizzle))

    how: dict[str, Any] = {"compiler_params": plgpu.CompilerParams(approx_math=True)}
    if interpret:
        how = {"interpret": interpreter()}
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            config=config,
            group=group,
            tile_rows=tile_rows,
            tiles=tiles,
            page_size=page_size,
            scale=scale,
            window=window,
            ring=ring,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct(queries.shape, jnp.bfloat16),
        grid=(tiles, kv_heads, batch),
        grid_names=("tile", "head", "slot"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared(lines, head_dim),
            shared(config.slots, config.key_block, head_dim),
            shared(config.slots, config.key_block, head_dim),
            plgpu.Barrier(num_arrivals=group),
            plgpu.Barrier(num_barriers=config.slots),
            plgpu.Barrier(num_barriers=config.slots),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.slots),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.slots),
            plgpu.Barrier(num_barriers=config.warpgroups),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ],
        **how,
    )(queries.astype(jnp.bfloat16), key_pool, value_pool, page_table, starts)
    return out.astype(queries.dtype)


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    out_ref,
    queries,
    keys,
    values,
    queries_here,
    keys_here,
    values_here,
    keys_done,
    values_done,
    turn_of,
    mixed_here,
    *,
    config: Config,
    group: int,
    tile_rows: int,
    tiles: int,
    page_size: int,
    scale: float,
    window: int | None,
    ring: bool,
    interpret: bool,
) -> None:
    head, slot = (jax.lax.axis_index(name) for name in ("head", "slot"))
    warpgroup = jax.lax.axis_index("warpgroup")
    key_block, slots, computing = config.key_block, config.slots, config.warpgroups
    all_rows, head_dim, pages = query_ref.shape[1], query_ref.shape[3], table_ref.shape[1]
    def first_row_of_tile() -> Array:
        return jnp.minimum((tiles - 1 - jax.lax.axis_index("tile")) * tile_rows, all_rows - tile_rows)

    def blocks_of_tile() -> tuple[Array, Array, Array, Array, Array]:
        """The first row's token; numbers of blocks: from and to where a row of the tile sees a key, or all see all.

        Each branch asks for itself, or what only the copies need would stand in registers of the others.
        """
        first_token = starts_ref[slot] + first_row_of_tile()
        last_token = first_token + (tile_rows - 1)
        begin, end = jnp.int32(0), jax.lax.div(last_token, key_block) + 1
        all_from, all_to = begin, jax.lax.div(first_token + 1, key_block)
        if window is not None:
            begin = jax.lax.div(jnp.maximum(first_token - (window - 1), 0), key_block)
            all_from = jax.lax.div(jnp.maximum(last_token - (window - 1), 0) + (key_block - 1), key_block)
        if not ring:
            blocks = pages * (page_size // key_block)
            begin, end = jnp.minimum(begin, blocks - 1), jnp.minimum(end, blocks)
        return first_token, begin, all_from, all_to, end

    @pl.when(warpgroup < computing)
    def _compute() -> None:
        if not interpret:
            plgpu.set_max_registers(240 if computing == 2 else 160, action="increase")
        first_token, begin, all_from, all_to, end = blocks_of_tile()
        layout = plgpu.Layout.WGMMA

        def laid(value: Array, of_line: bool = False) -> Array:
            return value if interpret else plgpu.layout_cast(value, layout.reduce(1) if of_line else layout)

        def iota(axis: int) -> Array:
            sizes = (_LINES, key_block)
            if interpret:
                return jax.lax.broadcasted_iota(jnp.int32, sizes, axis)
            return plgpu.broadcasted_iota(jnp.int32, sizes, axis, layout=layout)

        def over_keys(of_line: Array) -> Array:
            return jax.lax.broadcast_in_dim(of_line, (_LINES, key_block), [0])

        def slot_of(block: Array) -> Array:
            return jax.lax.rem(block - begin, slots)

        lines = pl.ds(warpgroup * _LINES, _LINES)
        factor = scale * math.log2(math.e)

        def weigh(scores: Array, highest: Array, total: Array, block: Array, masked: bool) -> tuple[Array, ...]:
            """The new maximum and sum, the factor of what came before, and the block's weights."""
            if masked:
                line = warpgroup * _LINES + iota(0)
                ahead = first_token - block * key_block + jax.lax.rem(line, jnp.int32(tile_rows)) - iota(1)
                seen = ahead >= 0
                if window is not None:
                    seen &= ahead < window
                scores = jnp.where(seen, scores, -jnp.inf)
            new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
            weights = jnp.exp2(scores * factor - over_keys(new_highest))
            keep = jnp.exp2(highest - new_highest)
            total = total * keep + weights.sum(axis=1)
            return new_highest, total, keep, weights

        def mix_here(narrow: Array, mixed: Array, value_slot: Array) -> Array:
            """In the interpreter, which multiplies nothing from registers."""
            return mixed + jnp.dot(narrow.astype(jnp.float32), values[value_slot].astype(jnp.float32))

        def wait_for_turn() -> None:
            if config.take_turns:
                plgpu.barrier_wait(turn_of.at[warpgroup])

        def pass_turn() -> None:
            if config.take_turns:
                plgpu.barrier_arrive(turn_of.at[jax.lax.rem(warpgroup + 1, computing)])

        def first_scores(scores_ref):
            plgpu.barrier_wait(keys_here.at[0])
            wait_for_turn()
            plgpu.wgmma(scores_ref, queries.at[lines], keys.at[0].T)
            pass_turn()
            return scores_ref[...]

        def visit(masked: bool, block: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            """Scores and weights of a block, and the mix of the block before."""
            here, before = slot_of(block), slot_of(block - 1)
            highest, total, narrow, mixed = state

            def weigh_next(mixed_ref=None):
                def score(scores_ref):
                    plgpu.barrier_wait(keys_here.at[here])
                    plgpu.barrier_wait(values_here.at[before])
                    wait_for_turn()
                    plgpu.wgmma(scores_ref, queries.at[lines], keys.at[here].T)
                    if mixed_ref is not None:
                        plgpu.wgmma(mixed_ref, narrow, values.at[before])
                    pass_turn()
                    return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

                scores = pl.run_scoped(score, ACC((_LINES, key_block), jnp.float32))
                plgpu.barrier_arrive(keys_done.at[here])
                return weigh(scores, highest, total, block, masked)

            def beside(refs):
                refs[1][...], refs[2][...], refs[3][...], refs[4][...] = weigh_next(refs[0])

            if interpret:
                new_highest, total, keep, weights = weigh_next()
                mixed = mix_here(narrow, mixed, before)
            else:
                weights = laid(jnp.zeros((_LINES, key_block), jnp.float32))
                results = pl.run_state(beside)((ACC.init(mixed), highest, total, highest, weights))
                mixed, new_highest, total, keep, weights = cast("tuple[Array, ...]", results)
            plgpu.barrier_arrive(values_done.at[before])
            # Not earlier: the weights of the block before are in use until the products are done.
            narrow = jax.lax.optimization_barrier(weights).astype(jnp.bfloat16)
            mixed = mixed * jax.lax.broadcast_in_dim(keep, mixed.shape, [0])
            return new_highest, total, narrow, mixed

        if config.take_turns:
            pl.when(warpgroup == computing - 1)(pass_turn)
        plgpu.barrier_wait(queries_here)
        scores = pl.run_scoped(first_scores, ACC((_LINES, key_block), jnp.float32))
        plgpu.barrier_arrive(keys_done.at[0])
        highest = laid(jnp.full((_LINES,), LOWEST, jnp.float32), True)
        total = laid(jnp.zeros((_LINES,), jnp.float32), True)
        highest, total, _, weights = weigh(scores, highest, total, begin, True)
        state = (highest, total, weights.astype(jnp.bfloat16), laid(jnp.zeros((_LINES, head_dim), jnp.float32)))
        second = begin + 1
        seen_from = second if window is None else jnp.clip(all_from, second, end)
        seen_to = jnp.clip(all_to, seen_from, end)
        if window is not None:
            state = jax.lax.fori_loop(second, seen_from, functools.partial(visit, True), state)
        state = jax.lax.fori_loop(seen_from, seen_to, functools.partial(visit, False), state)
        state = jax.lax.fori_loop(seen_to, end, functools.partial(visit, True), state)
        _, total, narrow, mixed = state
        last = slot_of(end - 1)
        plgpu.barrier_wait(values_here.at[last])
        if interpret:
            mixed = mix_here(narrow, mixed, last)
        else:
            mix_last = pl.run_state(lambda mixed_ref: plgpu.wgmma(mixed_ref, narrow, values.at[last]))
            mixed = cast("Array", mix_last(ACC.init(mixed)))
        plgpu.barrier_arrive(values_done.at[last])
        if config.take_turns:
            pl.when(warpgroup == 0)(wait_for_turn)
        share = 1.0 / jnp.where(total == 0.0, 1.0, total)
        mixed = mixed * jax.lax.broadcast_in_dim(share, mixed.shape, [0])
        queries[lines] = mixed.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(mixed_here)

    @pl.when(warpgroup == computing)
    def _copy() -> None:
        if not interpret:
            plgpu.set_max_registers(24 if computing == 2 else 32, action="decrease")

        _, begin, _, _, end = blocks_of_tile()
        first_row = first_row_of_tile()

        def of_head(number: int) -> tuple[Any, Any]:
            """Where the rows of a head are in global memory and in the tile."""
            return (slot, pl.ds(first_row, tile_rows), head * group + number), pl.ds(number * tile_rows, tile_rows)

        for number in range(group):
            at, of_tile = of_head(number)
            plgpu.copy_gmem_to_smem(query_ref.at[at], queries.at[of_tile], queries_here)

        def copy(block: Array, _: None) -> None:
            token = block * key_block
            page_number = jax.lax.div(token, page_size)
            page = table_ref[slot, jax.lax.rem(page_number, pages) if ring else page_number]
            at = pl.ds(page * page_size + jax.lax.rem(token, page_size), key_block)
            here, filled = jax.lax.rem(block - begin, slots), block - begin >= slots
            for source, target, arrived, done in (
                (key_ref, keys, keys_here, keys_done),
                (value_ref, values, values_here, values_done),
            ):
                pl.when(filled)(functools.partial(plgpu.barrier_wait, done.at[here]))
                plgpu.copy_gmem_to_smem(source.at[at, head], target.at[here], arrived.at[here])

        jax.lax.fori_loop(begin, end, copy, None)
        for number in range(slots):  # nobody leaves before all that was copied has been read

            @pl.when(number < end - begin)
            def _(number: int = number) -> None:
                for done in (keys_done, values_done):
                    plgpu.barrier_wait(done.at[number])

        plgpu.barrier_wait(mixed_here)
        for number in range(group):
            at, of_tile = of_head(number)
            plgpu.copy_smem_to_gmem(queries.at[of_tile], out_ref.at[at])
        plgpu.wait_smem_to_gmem(0)
