"""Block attention for chunks of a prompt as a Pallas Mosaic GPU kernel, for heads of 64 to 256 on Hopper cards.

A program takes 128 lines of one slot and KV head and reads all keys that they see, or a split's share of them where
such programs are too few for the card. While a warpgroup takes exponentials of a block's scores, its weights of the
block before are multiplied with their values, and the other warpgroup's products run. They issue products in turns.

    grid (tiles from the last rows on, kv_heads, slots * splits)
      warpgroup 0, 1   64 lines each: scores of a block -> running maximum and sum -> weights @ values
      warpgroup 2      copies: queries, blocks of keys and values (some slots of memory ahead), the result

A line is a row of one head; a tile has the same rows of all heads of the group, one head behind the other. Where rows
do not divide into tiles, the last tile begins earlier: its first rows are computed twice, with the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention import hopper
from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.block_attention.combine import combine
from pallas_kernels.block_attention.hopper import LINES, PROGRAMS
from pallas_kernels.online_softmax import LOWEST

TILE = 2 * LINES
LEAST_ROWS = 128
"""Of a chunk; steps and trees have fewer rows and other kernels, so that plain steps and blocks have the same bits."""
_COST_OF_SPLIT = 0.04
"""Beside a wave of programs: sums that are written, read and put together."""
ROWS = 8
"""Shared memory is laid out in groups of so many lines; rows of a head are as many, or copies do not fit."""
HEAD_DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    key_block  keys that a warpgroup looks at together
    slots      blocks of keys, and as many of values, that shared memory holds
    splits     shares of the keys, each a program of its own; None: what fills the card
    """

    key_block: int
    slots: int
    splits: int | None = None


def config_for(head_dim: int, page_size: int) -> Config:
    """What was fastest on an H100; heads of 256 leave registers for 64 keys only."""
    key_block = 64 if head_dim == 256 or page_size % 128 else 128
    return Config(key_block, slots={64: 2, 128: 3, 256: 2}[head_dim])


def why_not(
    queries: Any,
    key_pool: Any,
    value_pool: Any,
    *,
    page_size: int,
    window: int | None,
    causal: bool,
    compact: bool,
    tree: bool,
) -> str | None:
    """What the kernel cannot take about these arguments, as the end of a sentence; None when it can."""
    del window  # any, and none
    rows, heads, head_dim = queries.shape[1:]
    group = heads // key_pool.shape[1]
    if head_dim not in HEAD_DIMS or compact:
        return f"takes heads of {HEAD_DIMS}, not compact, got {head_dim}, compact {compact}"
    if reason := hopper.why_not_pools(key_pool, value_pool):
        return reason
    if not causal or tree:
        return f"takes causal rows that form no tree, got causal {causal}, tree {tree}"
    if page_size % 64:
        return f"takes pages of a multiple of 64 tokens, got {page_size}"
    if rows < LEAST_ROWS or rows % ROWS:
        return f"takes a multiple of {ROWS} rows from {LEAST_ROWS} on, got {rows}"
    if group * ROWS > TILE:
        return f"takes groups of {TILE // ROWS} heads at most, got {group}"
    return None


def splits_of(programs: int, blocks: int) -> int:
    """What takes least: programs run in waves of one for each multiprocessor, and a half-empty wave takes as long.

    It follows from shapes alone, so that the same row is always split alike.
    """
    options = [splits for splits in (1, 2, 4) if splits <= max(1, blocks // 2)]
    return min(options, key=lambda splits: -(-programs * splits // PROGRAMS) / splits + _COST_OF_SPLIT * splits)


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
    """See `api.block_attention`. Raises NotImplementedError for what `why_not` names."""
    options = {"page_size": page_size, "window": window, "causal": causal, "compact": compact}
    if reason := why_not(queries, key_pool, value_pool, **options, tree=tree is not None):
        raise NotImplementedError(f"block_attention on Mosaic, for chunks, {reason}")
    batch, rows, heads, head_dim = queries.shape
    kv_heads = key_pool.shape[1]
    group = heads // kv_heads
    config = config or config_for(head_dim, page_size)
    tile_rows = min(TILE // group, rows) // ROWS * ROWS
    tiles = -(-rows // tile_rows)
    blocks = page_table.shape[1] * page_size // config.key_block
    splits = config.splits or splits_of(batch * kv_heads * tiles, blocks)
    sums = (splits, batch, kv_heads, tiles * TILE)
    shapes = [(*sums, head_dim), sums, sums]
    results = plgpu.kernel(
        functools.partial(
            _kernel,
            config=config,
            group=group,
            tile_rows=tile_rows,
            tiles=tiles,
            splits=splits,
            page_size=page_size,
            scale=scale,
            window=window,
            ring=ring,
            interpret=interpret,
        ),
        out_type=[jax.ShapeDtypeStruct(queries.shape, jnp.bfloat16)]
        if splits == 1
        else [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(tiles, kv_heads, batch * splits),
        grid_names=("tile", "head", "place"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            hopper.shared(TILE, head_dim),
            hopper.shared(config.slots, config.key_block, head_dim),
            hopper.shared(config.slots, config.key_block, head_dim),
            plgpu.Barrier(num_arrivals=group),
            plgpu.Barrier(num_barriers=config.slots),
            plgpu.Barrier(num_barriers=config.slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.slots),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.slots),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        **hopper.how(interpret=interpret),
    )(queries.astype(jnp.bfloat16), key_pool, value_pool, page_table, starts)
    if splits == 1:
        return results[0].astype(queries.dtype)

    def entry(row: Array, of_group: Array) -> Array:
        tile = row // tile_rows
        return tile * TILE + of_group * tile_rows + row - jnp.minimum(tile * tile_rows, rows - tile_rows)

    how = {"rows": rows, "group": group, "dtype": queries.dtype, "entry": entry, "interpret": interpret}
    return combine(*results, **how)


class _Work(NamedTuple):
    """What a program does: `begin` is the split's first block of keys that rows of the tile see.

    Of the split's blocks from there on, `visits` have keys that some row sees; in numbers `all_from` to `all_to` every
    row sees every key.
    """

    tile: Array
    head: Array
    slot: Array
    split: Array
    first_row: Array
    first_token: Array
    begin: Array
    all_from: Array
    all_to: Array
    visits: Array


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    *refs,
    config: Config,
    group: int,
    tile_rows: int,
    tiles: int,
    splits: int,
    page_size: int,
    scale: float,
    window: int | None,
    ring: bool,
    interpret: bool,
) -> None:
    *out_refs, queries, keys, values, queries_here, keys_here, values_here = refs[:-4]
    keys_done, values_done, turn_of, mixed_here = refs[-4:]
    warpgroup = jax.lax.axis_index("warpgroup")
    key_block, slots = config.key_block, config.slots
    all_rows, head_dim, pages = query_ref.shape[1], query_ref.shape[3], table_ref.shape[1]

    def work() -> _Work:
        """Each branch asks for itself, or what only the copies need would stand in registers of the others."""
        tile, head, place = (jax.lax.axis_index(name) for name in ("tile", "head", "place"))
        tile, slot, split = tiles - 1 - tile, jax.lax.div(place, splits), jax.lax.rem(place, splits)
        first_row = jnp.minimum(tile * tile_rows, all_rows - tile_rows)
        first_token = starts_ref[slot] + first_row
        last_token = first_token + (tile_rows - 1)
        begin, end = jnp.int32(0), jax.lax.div(last_token, key_block) + 1
        all_from, all_to = begin, jax.lax.div(first_token + 1, key_block)
        if window is not None:
            begin = jax.lax.div(jnp.maximum(first_token - (window - 1), 0), key_block)
            all_from = jax.lax.div(jnp.maximum(last_token - (window - 1), 0) + (key_block - 1), key_block)
        if not ring:
            end = jnp.minimum(end, pages * (page_size // key_block))
        begin += jax.lax.rem(split + splits - jax.lax.rem(begin, splits), splits)

        def before(block: Array) -> Array:
            return jax.lax.div(jnp.maximum(block - begin, 0) + (splits - 1), splits)

        visits = jnp.maximum(before(end), 1)  # what begins with a block has one, even if no row sees it
        return _Work(tile, head, slot, split, first_row, first_token, begin, before(all_from), before(all_to), visits)

    @pl.when(warpgroup < 2)
    def _compute() -> None:
        if not interpret:
            plgpu.set_max_registers(240, action="increase")
        mine = work()
        visits = mine.visits
        laid = functools.partial(hopper.laid, interpret=interpret)
        iota = functools.partial(hopper.iota, key_block, interpret=interpret)

        def over_keys(of_line: Array) -> Array:
            return jax.lax.broadcast_in_dim(of_line, (LINES, key_block), [0])

        def slot_of(turn: Array) -> Array:
            return jax.lax.rem(turn, slots)

        lines = pl.ds(warpgroup * LINES, LINES)
        factor = scale * math.log2(math.e)

        def weigh(scores: Array, highest: Array, total: Array, turn: Array, masked: bool) -> tuple[Array, ...]:
            """The new maximum and sum, the factor of what came before, and the block's weights."""
            if masked:
                line = warpgroup * LINES + iota(0)
                ahead = (
                    mine.first_token
                    - (mine.begin + turn * splits) * key_block
                    + jax.lax.rem(line, jnp.int32(tile_rows))
                    - iota(1)
                )
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
            plgpu.barrier_wait(turn_of.at[warpgroup])

        def pass_turn() -> None:
            plgpu.barrier_arrive(turn_of.at[1 - warpgroup])

        def first_scores(scores_ref):
            plgpu.barrier_wait(keys_here.at[0])
            wait_for_turn()
            plgpu.wgmma(scores_ref, queries.at[lines], keys.at[0].T)
            pass_turn()
            return scores_ref[...]

        def visit(masked: bool, turn: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            """Scores and weights of a block, and the mix of the block before."""
            here, before = slot_of(turn), slot_of(turn - 1)
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

                scores = pl.run_scoped(score, ACC((LINES, key_block), jnp.float32))
                plgpu.barrier_arrive(keys_done.at[here])
                return weigh(scores, highest, total, turn, masked)

            def beside(refs):
                refs[1][...], refs[2][...], refs[3][...], refs[4][...] = weigh_next(refs[0])

            if interpret:
                new_highest, total, keep, weights = weigh_next()
                mixed = mix_here(narrow, mixed, before)
            else:
                weights = laid(jnp.zeros((LINES, key_block), jnp.float32))
                results = pl.run_state(beside)((ACC.init(mixed), highest, total, highest, weights))
                mixed, new_highest, total, keep, weights = cast("tuple[Array, ...]", results)
            plgpu.barrier_arrive(values_done.at[before])
            # Not earlier: the weights of the block before are in use until the products are done.
            narrow = jax.lax.optimization_barrier(weights).astype(jnp.bfloat16)
            mixed = mixed * jax.lax.broadcast_in_dim(keep, mixed.shape, [0])
            return new_highest, total, narrow, mixed

        pl.when(warpgroup == 1)(pass_turn)
        plgpu.barrier_wait(queries_here)
        scores = pl.run_scoped(first_scores, ACC((LINES, key_block), jnp.float32))
        plgpu.barrier_arrive(keys_done.at[0])
        highest = laid(jnp.full((LINES,), LOWEST, jnp.float32))
        total = laid(jnp.zeros((LINES,), jnp.float32))
        highest, total, _, weights = weigh(scores, highest, total, jnp.int32(0), True)
        state = (highest, total, weights.astype(jnp.bfloat16), laid(jnp.zeros((LINES, head_dim), jnp.float32)))
        seen_from = jnp.int32(1) if window is None else jnp.clip(mine.all_from, 1, visits)
        seen_to = jnp.clip(mine.all_to, seen_from, visits)
        if window is not None:
            state = jax.lax.fori_loop(1, seen_from, functools.partial(visit, True), state)
        state = jax.lax.fori_loop(seen_from, seen_to, functools.partial(visit, False), state)
        state = jax.lax.fori_loop(seen_to, visits, functools.partial(visit, True), state)
        highest, total, narrow, mixed = state
        last = slot_of(visits - 1)
        plgpu.barrier_wait(values_here.at[last])
        if interpret:
            mixed = mix_here(narrow, mixed, last)
        else:
            mix_last = pl.run_state(lambda mixed_ref: plgpu.wgmma(mixed_ref, narrow, values.at[last]))
            mixed = cast("Array", mix_last(ACC.init(mixed)))
        plgpu.barrier_arrive(values_done.at[last])
        pl.when(warpgroup == 0)(wait_for_turn)
        if splits > 1:
            of_tile = pl.ds(mine.tile * TILE + warpgroup * LINES, LINES)
            sums = (mixed, highest * math.log(2), total)
            for ref, value in zip(out_refs, sums, strict=True):
                ref[mine.split, mine.slot, mine.head, of_tile] = value
        else:
            share = 1.0 / jnp.where(total == 0.0, 1.0, total)
            mixed = mixed * jax.lax.broadcast_in_dim(share, mixed.shape, [0])
            queries[lines] = mixed.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(mixed_here)

    @pl.when(warpgroup == 2)
    def _copy() -> None:
        if not interpret:
            plgpu.set_max_registers(24, action="decrease")

        mine = work()
        slot, head, visits = mine.slot, mine.head, mine.visits

        def of_head(number: int) -> tuple[Any, Any]:
            """Where the rows of a head are in global memory and in the tile."""
            return (slot, pl.ds(mine.first_row, tile_rows), head * group + number), pl.ds(number * tile_rows, tile_rows)

        for number in range(group):
            at, of_tile = of_head(number)
            plgpu.copy_gmem_to_smem(query_ref.at[at], queries.at[of_tile], queries_here)

        def copy(turn: Array, _: None) -> None:
            token = (mine.begin + turn * splits) * key_block
            column = jax.lax.div(token, page_size)
            column = jax.lax.rem(column, pages) if ring else jnp.minimum(column, pages - 1)
            at = pl.ds(table_ref[slot, column] * page_size + jax.lax.rem(token, page_size), key_block)
            here = jax.lax.rem(turn, slots)
            for source, target, arrived, done in (
                (key_ref, keys, keys_here, keys_done),
                (value_ref, values, values_here, values_done),
            ):
                pl.when(turn >= slots)(functools.partial(plgpu.barrier_wait, done.at[here]))
                plgpu.copy_gmem_to_smem(source.at[at, head], target.at[here], arrived.at[here])

        jax.lax.fori_loop(0, visits, copy, None)
        for number in range(slots):  # nobody leaves before all that was copied has been read

            @pl.when(number < visits)
            def _(number: int = number) -> None:
                for done in (keys_done, values_done):
                    plgpu.barrier_wait(done.at[number])

        if splits == 1:
            plgpu.barrier_wait(mixed_here)
            for number in range(group):
                at, of_tile = of_head(number)
                plgpu.copy_smem_to_gmem(queries.at[of_tile], out_refs[0].at[at])
            plgpu.wait_smem_to_gmem(0)
