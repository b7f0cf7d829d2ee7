"""What a program of the Mosaic kernels for chunks does: attention of 128 lines over blocks of paged keys.

A kernel says which lines these are and which blocks they read (`Work`); the rest is here. While a warpgroup takes
exponentials of a block's scores, its weights of the block before are multiplied with their values, and the other
warpgroup's products run. They issue products in turns.

      warpgroup 0, 1   64 lines each: scores of a block -> running maximum and sum -> weights @ values
      warpgroup 2      copies: queries, blocks of keys and values (some slots of memory ahead), the result
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.hopper import LINES
from pallas_kernels.online_softmax import LOWEST

TILE = 2 * LINES
HEAD_DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    key_block  keys that a warpgroup looks at together
    slots      blocks of keys, and as many of values, that shared memory holds
    splits     shares of the keys, each a program of its own; None: as many as the kernel's rule says
    """

    key_block: int
    slots: int
    splits: int | None = None


class Work(NamedTuple):
    """What a program does.

    Lines are rows from `first_row` on, of which the first sees keys up to token index `last_seen` (causal rows: its
    own), of the heads that `head` has, one head behind the other. They read `visits` blocks of keys (one at least); in
    those numbered `all_from` to `all_to` every row sees every key. `token_of` has the token index of a visit's first
    key.
    """

    tile: Array
    head: Array
    kv_head: Array
    slot: Array
    split: Array
    first_row: Array
    last_seen: Array
    token_of: Callable[[Array], Array]
    all_from: Array
    all_to: Array
    visits: Array


class Memory(NamedTuple):
    """References to shared memory and barriers, in the order of `_scratch`."""

    queries: Any
    keys: Any
    values: Any
    queries_here: Any
    keys_here: Any
    values_here: Any
    keys_done: Any
    values_done: Any
    turn_of: Any
    mixed_here: Any


def _scratch(config: Config, head_dim: int, group: int) -> list[Any]:
    return [
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
    ]


def launch(
    kernel: Callable[..., None],
    queries: Float[Array, "B T H D"],
    *others: Array,
    config: Config,
    tiles: int,
    heads: int,
    splits: int,
    interpret: bool,
) -> list[Array]:
    """Runs a kernel in a grid (tiles, heads, slots * splits) of programs that stand for H / heads heads each.

    The kernel gets references to queries and the others, to results and to `Memory`. Results are the attention of all
    rows; with splits sums that `combine` puts together.
    """
    batch, _, all_heads, head_dim = queries.shape
    sums = (splits, batch, heads, tiles * TILE)
    shapes = [(*sums, head_dim), sums, sums]
    run = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(queries.shape, jnp.bfloat16)]
        if splits == 1
        else [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(tiles, heads, batch * splits),
        grid_names=("tile", "head", "place"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=_scratch(config, head_dim, all_heads // heads),
        **hopper.how(interpret=interpret),
    )
    return run(queries.astype(jnp.bfloat16), *others)


def results_and_memory(refs: Sequence[Any]) -> tuple[Sequence[Any], Memory]:
    """What a kernel gets behind its arguments."""
    size = len(Memory._fields)
    return refs[:-size], Memory(*refs[-size:])


def place(tiles: int, splits: int) -> tuple[Array, Array, Array, Array]:
    """Tile, head, slot and split of a program. The last tiles come first: they have most to read."""
    tile, head, place = (jax.lax.axis_index(name) for name in ("tile", "head", "place"))
    return tiles - 1 - tile, head, jax.lax.div(place, splits), jax.lax.rem(place, splits)


def attend(
    work: Callable[[], Work],
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    table_ref: Any,
    out_refs: Sequence[Any],
    memory: Memory,
    *,
    config: Config,
    group: int,
    tile_rows: int,
    splits: int,
    page_size: int,
    scale: float,
    interpret: bool,
    window: int | None = None,
    causal: bool = True,
    ring: bool = False,
) -> None:
    """The body of a kernel, for all three warpgroups.

    Causal rows see one key more than the row before, others (which have no window) the same keys as the first.
    Each branch asks for `work` itself, or what only the copies need would stand in registers of the others.
    """
    queries, keys, values, queries_here, keys_here, values_here, keys_done, values_done, turn_of, mixed_here = memory
    warpgroup = jax.lax.axis_index("warpgroup")
    key_block, slots = config.key_block, config.slots
    head_dim, pages = query_ref.shape[3], table_ref.shape[1]

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
                ahead = mine.last_seen - mine.token_of(turn)
                if causal:
                    ahead += jax.lax.rem(line, jnp.int32(tile_rows))
                ahead -= iota(1)
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

        def first_pool_row(turn: Array) -> Array:
            token = mine.token_of(turn)
            column = jax.lax.div(token, page_size)
            column = jax.lax.rem(column, pages) if ring else jnp.minimum(column, pages - 1)
            return table_ref[slot, column] * page_size + jax.lax.rem(token, page_size)

        def copy(turn: Array, _: None) -> None:
            at = pl.ds(first_pool_row(turn), key_block)
            here = jax.lax.rem(turn, slots)
            for source, target, arrived, done in (
                (key_ref, keys, keys_here, keys_done),
                (value_ref, values, values_here, values_done),
            ):
                pl.when(turn >= slots)(functools.partial(plgpu.barrier_wait, done.at[here]))
                plgpu.copy_gmem_to_smem(source.at[at, mine.kv_head], target.at[here], arrived.at[here])

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
