"""Block attention as a Pallas Triton kernel.

One program works on one slot, one KV head, one tile of query rows and one share of the keys; the heads that share the
KV head stand below each other in the tile (row r of head g is line `r * group + g`), so that K and V are read once for
all of them. Blocks of keys lie at fixed absolute positions. The last block that a row sees has a split of its own;
those before it are dealt out in turn: of S other splits, split s takes blocks s, s + S, s + 2 S ... that its rows can
see, with an online softmax in f32. So all programs are busy whatever the length of the context, and a row's sums do not
depend on how far its neighbours reach. Neighbouring rows are masked, never mixed in: a row's bits do not depend on
them. combine.py puts the splits together, always in the same order. Being jitted by itself, the kernel is lowered once
for all layers of a shape.

    grid (slots * splits, kv_heads, tiles)   q tile [lines, D] stays in registers
      for each block of the split            K block [BLOCK, D] -> scores -> running maximum and sum -> V block

Rows of a tree have their ancestors at other places than a chain has its rows, and sums over other places have other
bits. So the blocks where the tree is stored are visited once for each path (paths.py) of the tile's rows: its keys are
gathered in the order of a chain, and lines of rows that another path takes are masked. It is the last split that does
so (and, if the tree lies in two blocks, the one that owns the first of them), beside the others' reading of the text.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention.ancestry import STEP_ROWS, Ancestry
from pallas_kernels.block_attention.combine import combine, splits_for
from pallas_kernels.block_attention.dealing import first_from, visits_before
from pallas_kernels.block_attention.paths import keys_of_paths, paths_of
from pallas_kernels.online_softmax import LEAST_TILE, Sums, add_keys, no_sums, precision_of
from pallas_kernels.paged import why_not
from pallas_kernels.tuning import tuned

TUNED = Path(__file__).with_name("tuned.json")
FEW = 48
"""So many lines per KV head are few: small tiles of them do not read K and V too often."""
CHUNK = 128
"""More lines per KV head are a chunk of a prompt, and not a step."""
ROWS_PER_LANE = 4
"""Of a tree's rows that a tile holds: each may be the end of a path, and a program visits one path after the other."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How attention is cut into programs.

    tile        lines of a program, at most; a power of two
    key_block   keys that it looks at together
    programs    to aim at, by splitting the keys: some for each of 132 multiprocessors
    keys_first  scores are [keys, lines]: a Hopper card multiplies at least 64 rows at a time, and then reads K and V
                from shared memory once for all lines
    """

    tile: int
    key_block: int
    warps: int = 4
    stages: int = 2
    programs: int = 264
    keys_first: bool = False


def key(lines: int, key_dim: int, head_dim: int) -> str:
    """What tuned.json calls a shape."""
    compact = f", keys of {key_dim}" if key_dim < head_dim else ""
    kind = "chunk" if lines > CHUNK else "step" if lines > FEW else "few lines"
    return f"{kind}, heads of {head_dim}{compact}"


def config_for(lines: int, key_dim: int, head_dim: int, itemsize: int = 2) -> Config:
    """That of tuned.json for this device and shape, or one that fits registers and shared memory.

    Sweeps are of bf16: what fits then does not in f32.
    """
    known = tuned(TUNED, key(lines, key_dim, head_dim)) if itemsize == 2 else None
    return Config(**known) if known else rule(lines, head_dim)


def rule(lines: int, head_dim: int) -> Config:
    """A config for devices without a sweep: the tile's sums fit registers, what a step reads fits shared memory."""
    if head_dim > 256:
        return Config(64, 32, warps=8, stages=3) if lines > CHUNK else Config(32, 32)
    if head_dim > 128:
        return Config(128, 64, warps=8, stages=3) if lines > CHUNK else Config(32, 32)
    if head_dim > 64 or lines > CHUNK:
        return Config(64, 64)
    return Config(16, 64, programs=528)


@functools.partial(
    jax.jit, static_argnames=("page_size", "scale", "window", "causal", "ring", "compact", "config", "interpret")
)
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
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """See `api.block_attention`. Raises NotImplementedError for sizes that are not powers of two."""
    batch, rows, heads, _ = queries.shape
    kv_heads, head_dim = value_pool.shape[1:]
    group = heads // kv_heads
    if reason := why_not(page_size, key_pool.shape[2], head_dim):
        raise NotImplementedError(f"block_attention on Triton {reason}")
    alike = rows if tree is None else STEP_ROWS
    config = config or config_for(alike * group, key_pool.shape[2], head_dim, key_pool.dtype.itemsize)
    tile = min(config.tile, max(LEAST_TILE, pl.next_power_of_2(alike * group)))
    tiles = -(-rows * group // tile)
    # f32 takes twice the shared memory of bf16.
    key_block = min(config.key_block * 2 // key_pool.dtype.itemsize, page_size)
    programs = batch * kv_heads * -(-alike * group // tile)
    splits = splits_for(config.programs // programs, page_table.shape[1] * page_size // key_block)
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    shape = (splits, batch, kv_heads, tiles * tile)
    lanes, of_tree = 1, ()
    if tree is not None:
        of_tree = _by_path(tree, starts, page_table, tile, group, key_block, page_size, ring=ring)
        lanes = -(-of_tree.path_of.shape[2] // ROWS_PER_LANE) if splits > 1 else 1
    kernel = functools.partial(
        _kernel,
        rows=rows,
        group=group,
        tile=tile,
        splits=splits,
        key_block=key_block,
        page_size=page_size,
        scale=scale,
        window=window,
        causal=causal,
        ring=ring,
        compact=compact,
        keys_axis=0 if config.keys_first else 1,
        lanes=lanes,
    )
    mixed, highest, total = pl.pallas_call(
        kernel,
        grid=(batch * (splits - 1 + lanes), kv_heads, tiles),
        in_specs=[whole] * (5 + len(of_tree)),
        out_specs=[whole] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="block_attention",
    )(queries.astype(key_pool.dtype), key_pool, value_pool, page_table, starts, *of_tree)
    if splits > 1:
        return combine(mixed, highest, total, rows=rows, group=group, dtype=queries.dtype, interpret=interpret)
    mixed = mixed[0] / jnp.where(total == 0.0, 1.0, total)[0][..., None]
    mixed = mixed[:, :, : rows * group].reshape(batch, kv_heads, rows, group, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, rows, heads, head_dim).astype(queries.dtype)


class _OfTree(NamedTuple):
    """Arrays that a tree brings, or references to them.

    Paths (paths.py) are those of each of `tiles`; there is one for all rows where tiles would cut rows into pieces.
    """

    depths: Any
    last_blocks: Any
    """[slots]: the block where the deepest row's keys end."""
    counts: Any
    path_of: Any
    """[slots, tiles, rows]: the path that takes a row."""
    last_seen: Any
    pool_rows: Any
    """[slots, tiles, paths, keys]: where the keys of the tree's blocks are, in the order of a chain."""


def _by_path(
    tree: Ancestry,
    starts: Int[Array, " B"],
    page_table: Int[Array, "B P"],
    tile: int,
    group: int,
    key_block: int,
    page_size: int,
    *,
    ring: bool,
) -> _OfTree:
    """What a tree brings. These arrays are the same for all layers of a step: XLA makes them once."""
    rows = tree.depths.shape[1]
    paths = paths_of(tree, starts, rows if tile % group else min(rows, tile // group))
    blocks = -(-(rows - 1) // key_block) + 1
    at = keys_of_paths(
        tree, paths, starts, page_table, key_block=key_block, blocks=blocks, page_size=page_size, ring=ring
    )
    last_blocks = (starts + jnp.max(tree.depths, axis=1)) // key_block
    path_of = jnp.argmax(paths.last_seen >= 0, axis=2).astype(jnp.int32)
    return _OfTree(tree.depths, last_blocks, paths.counts, path_of, paths.last_seen, at)


def _kernel(
    query_ref,
    key_ref,
    value_ref,
    table_ref,
    starts_ref,
    *refs,
    rows: int,
    group: int,
    tile: int,
    splits: int,
    key_block: int,
    page_size: int,
    scale: float,
    window: int | None,
    causal: bool,
    ring: bool,
    compact: bool,
    keys_axis: int,
    lanes: int,
) -> None:
    """`refs` are what a tree brings, if the rows form one, and the results.

    The last split of a tree has some `lanes`: programs that take every so many of its paths each.
    """
    *of_tree, mixed_ref, highest_ref, total_ref = refs
    tree = _OfTree(*of_tree) if of_tree else None
    place, head, index = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    shares = splits - 1
    slot, part = jax.lax.div(place, shares + lanes), jax.lax.rem(place, shares + lanes)
    split, lane = jnp.minimum(part, shares), jnp.maximum(part - shares, 0)
    start = starts_ref[slot]
    line = jnp.minimum(index * tile + jnp.arange(tile, dtype=jnp.int32), rows * group - 1)
    row = jax.lax.div(line, group)
    of_line = (row, head * group + jax.lax.rem(line, group))
    key_dim = key_ref.shape[2]
    # Scores are not scaled: masked blocks would round the product, the others would not, and a row's bits would differ.
    query = _lines(query_ref, slot, of_line, 0, key_dim, scale)
    value_query = _lines(query_ref, slot, of_line, key_dim, value_ref.shape[2], scale) if compact else None
    in_share = split < shares

    def block_of(token: Array) -> Array:
        return jax.lax.div(token, key_block)

    def one_or(other: int, flag: Array) -> Array:
        """The other number where the flag is set; jax 0.10 makes booleans of small constants that it chooses from."""
        return 1 + flag.astype(jnp.int32) * (other - 1)

    def dealt(first: Array, share_end: Array, last_from: Array, end: Array) -> tuple[Array, Array, Array | int]:
        """The program's first block, how many it visits, and the step from one to the next.

        It is one of those that share the blocks `first..share_end`, or takes `last_from..end`, or all of them.
        """
        if not shares:
            return first, end - first, 1
        begin = first_from(first, split, shares)
        visits = visits_before(share_end, begin, shares)
        begin, visits = (jnp.where(in_share, *pair) for pair in ((begin, last_from), (visits, end - last_from)))
        return begin, visits, one_or(shares, in_share)

    def add(sums: Sums, block: tuple[Array, Array], seen: Array | None) -> Sums:
        """The sums with a block of keys and values, which all lines see if nothing else is said."""
        scores = _meet(query, block[0], keys_axis)  # [tile, key_block], or the keys first
        if value_query is not None:
            scores += _meet(value_query, block[1], keys_axis)
        return add_keys(sums, scores, seen, block[1], keys_axis=keys_axis)

    def seen_from(place: Array, token: Array, last_seen: Array) -> Array:
        """Which keys of the block that begins at a token count for lines that stand at and see these tokens."""
        last_block = block_of(last_seen) * key_block
        seen_to = jnp.where(in_share, last_block - 1, last_seen) if shares else last_seen
        key_token = place + jnp.expand_dims(jnp.arange(key_block, dtype=jnp.int32), 1 - keys_axis)
        seen = key_token <= jnp.expand_dims(seen_to, keys_axis)
        if shares:
            seen &= key_token >= jnp.expand_dims(jnp.where(in_share, 0, last_block), keys_axis)
        if window is not None:
            seen &= jnp.expand_dims(token, keys_axis) - key_token < window
        return seen

    start_block, last_row = block_of(start), start + rows - 1
    if tree is None:
        token = start + row
        last_seen = token if causal else jnp.full_like(token, last_row)
        first_token = start + jax.lax.div(index * tile, group)
        last_token = start + jnp.minimum(jax.lax.div(index * tile + (tile - 1), group), rows - 1)
        lowest, highest = (block_of(each) for each in ((first_token, last_token) if causal else (last_row, last_row)))
        end = highest + 1
        if not ring:
            blocks = table_ref.shape[1] * (page_size // key_block)
            lowest, highest, end = (jnp.minimum(each, blocks) for each in (lowest, highest, end))
    else:
        token = last_seen = start + plt.load(tree.depths.at[jnp.full_like(row, slot), row])
        first_token = start
        lowest = highest = end = start_block
    first_block = jnp.int32(0) if window is None else block_of(jnp.maximum(first_token - (window - 1), 0))
    begin, visits, step = dealt(first_block, highest, lowest, end)

    def visit(masked: bool, turn: Array, sums: Sums) -> Sums:
        place = (begin + turn * step) * key_block
        block = _load_block(key_ref, value_ref, table_ref, slot, head, key_block, page_size, ring, place)
        return add(sums, block, seen_from(place, token, last_seen) if masked else None)

    sums, clear = no_sums(tile, value_ref.shape[2], keys_axis=keys_axis), 0
    if window is None:  # before the first of the lines' last blocks all lines see all keys
        clear = dealt(first_block, lowest, lowest, lowest)[1]
        sums = jax.lax.fori_loop(0, clear, functools.partial(visit, False), sums)
    sums = jax.lax.fori_loop(clear, visits, functools.partial(visit, True), sums)
    valid = None
    if tree is not None:
        number = index if tree.counts.shape[1] > 1 else 0
        of_tile, row_of_tile = (slot, number), row - number * (tile // group)

        def of_rows(ref: Any, *path: Array) -> Array:
            return plt.load(ref.at[(*(jnp.full_like(row, each) for each in (*of_tile, *path)), row_of_tile)])

        last_block = tree.last_blocks[slot]
        tree_begin, of_path, tree_step = dealt(start_block, last_block, start_block, last_block + 1)
        lane_step = 1
        if lanes > 1:
            valid = in_share | (jax.lax.rem(of_rows(tree.path_of), lanes) == lane)
            lane_step = one_or(lanes, ~in_share)
        paths = visits_before(tree.counts[of_tile], lane, lane_step)

        def visit_path(turn: Array, sums: Sums) -> Sums:
            path = lane + jax.lax.div(turn, of_path) * lane_step
            block_number = tree_begin + jax.lax.rem(turn, of_path) * tree_step
            keys = (block_number - start_block) * key_block + jnp.arange(key_block, dtype=jnp.int32)
            at = plt.load(tree.pool_rows.at[(*(jnp.full_like(keys, each) for each in (*of_tile, path)), keys)])
            last_seen = of_rows(tree.last_seen, path)
            block = (_gathered(key_ref, at, head), _gathered(value_ref, at, head))
            return add(sums, block, seen_from(block_number * key_block, last_seen, last_seen))

        sums = jax.lax.fori_loop(0, paths * of_path, visit_path, sums)
    most, total, mixed = sums
    stored = (split, slot, head, pl.ds(index * tile, tile))
    plt.store(highest_ref.at[stored], most.reshape(tile), mask=valid)
    plt.store(total_ref.at[stored], total.reshape(tile), mask=valid)
    of_numbers = None if valid is None else jnp.broadcast_to(valid[:, None], (tile, value_ref.shape[2]))
    plt.store(mixed_ref.at[(*stored, slice(None))], mixed if keys_axis else mixed.T, mask=of_numbers)


def _load_block(
    key_ref, value_ref, table_ref, slot, head, key_block: int, page_size: int, ring: bool, place: Array
) -> tuple[Array, Array]:
    """K and V of the block of keys that begins at this token; a block lies in one page."""
    number = jax.lax.div(place, page_size)
    page = table_ref[slot, jax.lax.rem(number, table_ref.shape[1]) if ring else number]
    at = pl.ds(page * page_size + jax.lax.rem(place, page_size), key_block)
    return plt.load(key_ref.at[at, head, :]), plt.load(value_ref.at[at, head, :])


def _gathered(pool_ref, at: Array, head: Array) -> Array:
    """Some rows of a pool."""
    shape = (at.shape[0], pool_ref.shape[2])
    column = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
    return plt.load(pool_ref.at[jnp.broadcast_to(at[:, None], shape), jnp.broadcast_to(head, shape), column])


def _lines(query_ref, slot, of_line, first: int, width: int, scale: float):
    """Numbers `first..` of the queries of some rows and heads, scaled; loads take slices only or arrays only."""
    shape = (of_line[0].shape[0], width)
    column = jnp.broadcast_to(first + jnp.arange(width, dtype=jnp.int32)[None, :], shape)
    row, head = (jnp.broadcast_to(each[:, None], shape) for each in of_line)
    query = plt.load(query_ref.at[jnp.broadcast_to(slot, shape), row, head, column])
    return (query.astype(jnp.float32) * scale).astype(query.dtype)


def _meet(lines: Array, keys: Array, keys_axis: int) -> Array:
    """Scores of lines and keys."""
    first, second = (lines, keys) if keys_axis else (keys, lines)
    return plt.dot(first, second, trans_b=True, precision=precision_of(lines))
