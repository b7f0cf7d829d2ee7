"""Block attention for heads of 512 as a Pallas Mosaic GPU kernel, for Hopper cards.

The sums of 64 lines over 512 values do not fit the registers of Triton's programs, which take 32 lines at a time and
multiply with the small instruction. Here a program takes 64 lines with the large one, and two warpgroups share them.
Each has half of the values' columns: it mixes them into sums that stay in its registers, and multiplies queries with
them (and with half of the keys' columns) for half of each score's sum, 64 x 64 at a time. The other half it reads from
the other warpgroup. A third warpgroup copies keys and values to shared memory ahead of them.

    grid (slots * splits, kv_heads, tiles of 64 lines)
      warpgroup 0, 1   parts of a block's scores <-> running maximum and sum -> values 0..255, values 256..511
      warpgroup 2      copies: keys [64, 128] (one slot), halves of the values [64, 256] (three slots)

Blocks of keys are dealt out to splits in turn, and combine.py puts these together.

Rows of a tree read the blocks before the tree as a chain does. Then, in the splits that own them, come the blocks where
the tree is stored, once for each path of the tile's rows (paths.py): XLA has gathered these keys and values in the
order of a chain, and lines of rows that another path takes are masked.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.block_attention.ancestry import STEP_ROWS, Ancestry
from pallas_kernels.block_attention.combine import combine, splits_for
from pallas_kernels.block_attention.dealing import visits_before
from pallas_kernels.block_attention.paths import Paths, keys_of_paths, paths_of
from pallas_kernels.hopper import LINES, most_programs
from pallas_kernels.online_softmax import LOWEST

KEY_BLOCK = 64
HEAD_DIM, KEY_DIM = 512, 128
_HALF = HEAD_DIM // 2
_VALUE_SLOTS = 3
_TREE_BLOCKS = 2
"""Blocks of keys that the rows of a tree may lie in."""


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
    rows, heads = queries.shape[1:3]
    kv_heads, head_dim = value_pool.shape[1:]
    group = heads // kv_heads
    if head_dim != HEAD_DIM or not compact or key_pool.shape[2] != KEY_DIM:
        return f"takes compact keys of {KEY_DIM} and heads of {HEAD_DIM}, got {key_pool.shape[2]} and {head_dim}"
    if reason := hopper.why_not_pools(key_pool, value_pool):
        return reason
    if window is not None or not causal:
        return "takes causal attention without a window"
    if page_size % KEY_BLOCK:
        return f"takes pages of a multiple of {KEY_BLOCK} tokens, got {page_size}"
    if group not in (8, 16, 32, 64) or (rows * group % LINES and not tree):
        return f"takes a multiple of {LINES} lines by groups of 8 to {LINES}, got {rows} rows of groups of {group}"
    return None


@functools.partial(jax.jit, static_argnames=("page_size", "scale", "window", "causal", "ring", "compact", "interpret"))
def block_attention(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
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
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.block_attention`. Raises NotImplementedError for what `why_not` names."""
    options = {"page_size": page_size, "window": window, "causal": causal, "compact": compact}
    if ring or (reason := why_not(queries, key_pool, value_pool, **options, tree=tree is not None)):
        raise NotImplementedError(f"block_attention on Mosaic {'takes no ring of pages' if ring else reason}")
    batch, rows, heads, _ = queries.shape
    kv_heads = key_pool.shape[1]
    group = heads // kv_heads
    tiles = -(-rows * group // LINES)
    tiles_alike = tiles if tree is None else -(-STEP_ROWS * group // LINES)
    blocks = page_table.shape[1] * page_size // KEY_BLOCK
    splits = splits_for(most_programs() // (batch * kv_heads * tiles_alike), blocks)
    shape = (splits, batch, kv_heads, tiles * LINES)
    kernel = functools.partial(
        _kernel,
        group=group,
        splits=splits,
        blocks=blocks,
        page_size=page_size,
        scale=scale,
        interpret=interpret,
    )
    of_tree = ()
    if tree is not None:
        paths = paths_of(tree, starts, LINES // group)
        keys, values = _gathered(key_pool, value_pool, page_table, starts, tree, paths, page_size)
        of_tree = (paths.counts, _keys_seen(paths.last_seen, starts), keys, values)
    mixed, highest, total = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*shape, HEAD_DIM), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        grid=(batch * splits, kv_heads, tiles),
        grid_names=("place", "head", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            hopper.shared(LINES, KEY_DIM + HEAD_DIM),
            hopper.shared(KEY_BLOCK, KEY_DIM),
            hopper.shared(_VALUE_SLOTS, KEY_BLOCK, _HALF),
            plgpu.Barrier(num_arrivals=LINES // group),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=_VALUE_SLOTS),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=_VALUE_SLOTS),
            hopper.shared(2, LINES, KEY_BLOCK, dtype=jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
        ],
        **hopper.how(interpret=interpret),
    )(queries.astype(key_pool.dtype), key_pool, value_pool, page_table, starts, *of_tree)
    return combine(mixed, highest, total, rows=rows, group=group, dtype=queries.dtype, interpret=interpret)


def _gathered(
    key_pool: Array, value_pool: Array, page_table: Array, starts: Array, tree: Ancestry, paths: Paths, page_size: int
) -> tuple[Float[Array, "paths*keys kv_heads K"], Float[Array, "paths*keys kv_heads D"]]:
    """K and V of all paths (of slots, of tiles): the blocks that the tree may lie in, in the order of a chain."""
    at = keys_of_paths(
        tree, paths, starts, page_table, key_block=KEY_BLOCK, blocks=_TREE_BLOCKS, page_size=page_size
    ).reshape(-1)
    return jnp.take(key_pool, at, axis=0, mode="clip"), jnp.take(value_pool, at, axis=0, mode="clip")


def _keys_seen(
    last_seen: Int[Array, "B tiles paths rows"], starts: Int[Array, " B"]
) -> Int[Array, "B tiles paths blocks words"]:
    """How many keys of each of the tree's blocks a row sees on a path: a byte for a row, four in a word."""
    first = (starts // KEY_BLOCK * KEY_BLOCK)[:, None] + KEY_BLOCK * jnp.arange(_TREE_BLOCKS, dtype=jnp.int32)[None]
    seen = jnp.clip(last_seen[:, :, :, None] + 1 - first[:, None, None, :, None], 0, KEY_BLOCK)
    words = -(-seen.shape[-1] // 4)
    seen = jnp.pad(seen, [(0, 0)] * 4 + [(0, 4 * words - seen.shape[-1])]).reshape(*seen.shape[:-1], words, 4)
    return jnp.sum(jnp.left_shift(seen, 8 * jax.lax.broadcasted_iota(jnp.int32, seen.shape, 5)), axis=-1)


def _byte_of(words: list[Array], number: Array) -> Array:
    """The byte of this number in one or two words of four."""
    word = jnp.full_like(number, words[0]) if len(words) == 1 else jnp.where(number < 4, *words)
    return jax.lax.shift_right_logical(word, (number & 3) * 8) & 255


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    *refs,
    group: int,
    splits: int,
    blocks: int,
    page_size: int,
    scale: float,
    interpret: bool,
) -> None:
    """`refs` are what a tree brings, if the rows form one, the results, and shared memory and barriers."""
    (
        *paths,
        mixed_ref,
        highest_ref,
        total_ref,
        queries,
        keys,
        values,
        queries_here,
        keys_here,
        values_here,
        keys_done,
        values_done,
        parts,
        parts_here,
        parts_read,
    ) = refs
    place, head, tile = (jax.lax.axis_index(name) for name in ("place", "head", "tile"))
    warpgroup = jax.lax.axis_index("warpgroup")
    slot, split = jax.lax.div(place, splits), jax.lax.rem(place, splits)
    rows = LINES // group
    first_row = tile * rows
    start = starts_ref[slot]
    all_rows = query_ref.shape[1]
    if not paths:
        end = jnp.minimum(jax.lax.div(start + first_row + (rows - 1), KEY_BLOCK) + 1, blocks)
        clear = jnp.minimum(jax.lax.div(start + first_row + 1, KEY_BLOCK), end)  # all rows see all of these blocks
    else:
        end = clear = tree_block = jnp.minimum(jax.lax.div(start, KEY_BLOCK), blocks)
    visits = shared = visits_before(end, split, splits)
    all_seen = visits_before(clear, split, splits)
    if paths:
        counts_ref, seen_ref, path_keys_ref, path_values_ref = paths
        count = counts_ref[slot, tile]
        last_block = jnp.minimum(jax.lax.div(start + (all_rows - 1), KEY_BLOCK), blocks - 1)
        owns = [
            (jax.lax.rem(tree_block + number, splits) == split) & (tree_block + number <= last_block)
            for number in range(_TREE_BLOCKS)
        ]
        visits = shared + count * (owns[0].astype(jnp.int32) + owns[1].astype(jnp.int32))

    def of_path(turn: Array) -> tuple[Array, Array]:
        """The path of a turn behind those of the shared blocks, and which of the tree's blocks it is."""
        behind = turn - shared
        again = owns[0] & (behind >= count)
        return jnp.where(again, behind - count, behind), (again | ~owns[0]).astype(jnp.int32)

    def keys_seen(turn: Array) -> list[Array]:
        """How many keys of the block of a turn behind the shared ones each row sees, a byte for each."""
        path, number = of_path(turn)
        return [seen_ref[slot, tile, path, number, word] for word in range(seen_ref.shape[4])]

    @pl.when(warpgroup < 2)
    def _compute() -> None:
        if not interpret:
            plgpu.set_max_registers(240, action="increase")
        laid = functools.partial(hopper.laid, interpret=interpret)
        iota = functools.partial(hopper.iota, KEY_BLOCK, interpret=interpret)

        def row_of_line() -> Array:
            return jax.lax.shift_right_logical(iota(0), jnp.int32(group.bit_length() - 1))

        factor = scale * math.log2(math.e)
        key_columns = pl.ds(warpgroup * (KEY_DIM // 2), KEY_DIM // 2)
        plgpu.barrier_wait(queries_here)

        def visit(masked: bool, turn: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, mixed = sums
            of_rows = keys_seen(turn) if masked and paths else []
            mine, others = (jax.lax.rem(2 * turn + half, _VALUE_SLOTS) for half in (warpgroup, 1 - warpgroup))

            def score(scores_ref):
                plgpu.barrier_wait(values_here.at[mine])
                columns = pl.ds(KEY_DIM + warpgroup * _HALF, _HALF)
                plgpu.wgmma(scores_ref, queries.at[:, columns], values.at[mine].T)
                plgpu.barrier_wait(values_here.at[others])  # who uses a barrier has to see all of its phases
                plgpu.barrier_wait(keys_here)
                plgpu.wgmma(scores_ref, queries.at[:, key_columns], keys.at[:, key_columns].T)
                return scores_ref[...]

            part = pl.run_scoped(score, ACC((LINES, KEY_BLOCK), jnp.float32))
            plgpu.barrier_arrive(keys_done)
            pl.when(turn > 0)(functools.partial(plgpu.barrier_wait, parts_read.at[warpgroup]))
            parts[warpgroup] = part
            plgpu.barrier_arrive(parts_here.at[warpgroup])
            plgpu.barrier_wait(parts_here.at[1 - warpgroup])
            scores = part + parts[1 - warpgroup]
            plgpu.barrier_arrive(parts_read.at[1 - warpgroup])

            if masked and not paths:
                token = start + first_row + row_of_line()
                seen = (split + turn * splits) * KEY_BLOCK + iota(1) <= token
                scores = jnp.where(seen, scores, -jnp.inf)
            elif masked:
                seen = iota(1) < _byte_of(of_rows, row_of_line())
                scores = jnp.where(seen, scores, -jnp.inf)
            new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
            weights = jnp.exp2(scores * factor - jax.lax.broadcast_in_dim(new_highest, scores.shape, [0]))
            keep = jnp.exp2(highest - new_highest)
            total = total * keep + weights.sum(axis=1)
            mixed = mixed * jax.lax.broadcast_in_dim(keep, mixed.shape, [0])
            narrow = weights.astype(jnp.bfloat16)
            if interpret:
                mixed = mixed + jnp.dot(narrow.astype(jnp.float32), values[mine].astype(jnp.float32))
            else:

                def mix(mixed_ref):
                    plgpu.wgmma(mixed_ref, narrow, values.at[mine])

                mixed = cast("Array", pl.run_state(mix)(ACC.init(mixed)))
            plgpu.barrier_arrive(values_done.at[mine])
            return new_highest, total, mixed

        nothing = (
            laid(jnp.full((LINES,), LOWEST, jnp.float32)),
            laid(jnp.zeros((LINES,), jnp.float32)),
            laid(jnp.zeros((LINES, _HALF), jnp.float32)),
        )
        sums = jax.lax.fori_loop(0, all_seen, functools.partial(visit, False), nothing)
        highest, total, mixed = jax.lax.fori_loop(all_seen, visits, functools.partial(visit, True), sums)
        pl.when(visits > 0)(functools.partial(plgpu.barrier_wait, parts_read.at[warpgroup]))
        lines = pl.ds(tile * LINES, LINES)
        mixed_ref[split, slot, head, lines, pl.ds(warpgroup * _HALF, _HALF)] = mixed

        @pl.when(warpgroup == 0)
        def _() -> None:
            highest_ref[split, slot, head, lines] = highest * math.log(2)
            total_ref[split, slot, head, lines] = total

    @pl.when(warpgroup == 2)
    def _copy() -> None:
        if not interpret:
            plgpu.set_max_registers(24, action="decrease")
        for row in range(rows):
            number = first_row + row
            if all_rows % rows:  # what the last tile has too many is masked
                number = jnp.minimum(number, all_rows - 1)
            of_row = query_ref.at[slot, number, pl.ds(head * group, group)]
            plgpu.copy_gmem_to_smem(of_row, queries.at[pl.ds(row * group, group)], queries_here)

        def places(turn: Array) -> list[tuple[bool | Array, Any, Any, Any]]:
            """Where a turn's block begins: pools of keys and values and a place in both, each under a condition."""
            of_pools = jnp.clip(turn, 0, jnp.maximum(shared - 1, 0)) if paths else turn
            token = (split + of_pools * splits) * KEY_BLOCK
            page = table_ref[slot, jax.lax.div(token, page_size)]
            at = pl.ds(page * page_size + jax.lax.rem(token, page_size), KEY_BLOCK)
            if not paths:
                return [(True, key_ref, value_ref, at)]
            path, number = of_path(turn)
            before = (slot * -(-all_rows // rows) + tile) * rows + path
            gathered = pl.ds((before * _TREE_BLOCKS + number) * KEY_BLOCK, KEY_BLOCK)
            return [
                (turn < shared, key_ref, value_ref, at),
                (turn >= shared, path_keys_ref, path_values_ref, gathered),
            ]

        def copy(turn: Array, _: None) -> None:
            """In the order in which memory becomes free: the first half's slot is that of the turn before the last."""
            of_turn = places(turn)

            def copy_keys() -> None:
                pl.when(turn > 0)(functools.partial(plgpu.barrier_wait, keys_done))
                for condition, source, _, at in of_turn:
                    of_block = (source.at[at, head], keys, keys_here)
                    pl.when(condition)(functools.partial(plgpu.copy_gmem_to_smem, *of_block))

            def copy_values(half: int) -> None:
                number = 2 * turn + half
                here = jax.lax.rem(number, _VALUE_SLOTS)
                pl.when(number >= _VALUE_SLOTS)(functools.partial(plgpu.barrier_wait, values_done.at[here]))
                for condition, _, source, at in of_turn:
                    columns = pl.ds(half * _HALF, _HALF)
                    of_half = (source.at[at, head, columns], values.at[here], values_here.at[here])
                    pl.when(condition)(functools.partial(plgpu.copy_gmem_to_smem, *of_half))

            copy_values(0)
            copy_keys()
            copy_values(1)

        jax.lax.fori_loop(0, visits, copy, None)
        pl.when(visits > 0)(functools.partial(plgpu.barrier_wait, keys_done))
        for more in range(_VALUE_SLOTS):  # nobody leaves before all that was copied has been read
            number = 2 * visits + more
            done = values_done.at[jax.lax.rem(number, _VALUE_SLOTS)]
            pl.when(number >= _VALUE_SLOTS)(functools.partial(plgpu.barrier_wait, done))
