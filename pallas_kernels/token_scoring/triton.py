"""Token scores as two Pallas Triton kernels: softmax statistics page by page, then the mass of every token.

One program works on one page, one KV head and one query row, with a tile of the heads of that KV head: all of them, if
their queries are not too large for shared memory. The statistics of the pages are put together between the kernels.
Nothing larger than [rows, kv_heads * tiles, tokens] exists.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.online_softmax import LOWEST, precision_of
from pallas_kernels.paged import why_not

_LEAST_HEADS = 16
"""Tensor cores take 16 rows."""
_TILE_BYTES = 65_536
"""Of a tile's queries: they lie in shared memory (227 KiB on an H100) beside a page of keys, with the score of each."""


@functools.partial(jax.jit, static_argnames=("page_size", "scale", "reduce", "interpret"))
def token_scores(
    queries: Float[Array, "R H D"],
    key_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, " P"],
    length: Int[Array, ""],
    *,
    page_size: int,
    scale: float,
    reduce: str = "mean",
    interpret: bool = False,
) -> Float[Array, " scores"]:
    """See `api.token_scores`. Raises NotImplementedError for sizes that are not powers of two."""
    rows, heads, head_dim = queries.shape
    kv_heads, pages = key_pool.shape[1], page_table.shape[0]
    group = heads // kv_heads
    if reason := why_not(page_size, head_dim):
        raise NotImplementedError(f"token_scores on Triton {reason}")
    tile = max(_LEAST_HEADS, min(pl.next_power_of_2(group), _TILE_BYTES // (head_dim * key_pool.dtype.itemsize)))
    tiles = -(-group // tile)
    grouped = queries.reshape(rows, kv_heads, group, head_dim).astype(key_pool.dtype)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, tiles * tile - group), (0, 0)))
    grouped = grouped.reshape(rows, kv_heads * tiles, tile, head_dim)
    lengths = length.astype(jnp.int32).reshape(1)
    whole = pl.BlockSpec(memory_space=pl.ANY) if interpret else pl.BlockSpec()
    query_spec = pl.BlockSpec((None, None, tile, head_dim), lambda page, part, row: (row, part, 0, 0))
    sums_spec = pl.BlockSpec((None, None, None, tile), lambda page, part, row: (page, row, part, 0))
    sums = jax.ShapeDtypeStruct((pages, rows, kv_heads * tiles, tile), jnp.float32)
    static = {"page_size": page_size, "scale": scale, "tiles": tiles}
    call = functools.partial(
        pl.pallas_call,
        grid=(pages, kv_heads * tiles, rows),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )
    highest, total = call(
        functools.partial(_statistics_kernel, **static),
        in_specs=[query_spec, whole, whole, whole],
        out_specs=[sums_spec, sums_spec],
        out_shape=[sums, sums],
        name="token_scoring_statistics",
    )(grouped, key_pool, page_table, lengths)
    peak = jnp.max(highest, axis=0)  # [rows, kv_heads * tiles, tile]
    mass = jnp.sum(total * jnp.exp(highest - peak[None]), axis=0)
    mass_spec = pl.BlockSpec((None, None, tile), lambda page, part, row: (row, part, 0))
    by_row = call(
        functools.partial(_mass_kernel, group=group, reduce=reduce, **static),
        in_specs=[query_spec, whole, whole, whole, mass_spec, mass_spec],
        out_specs=pl.BlockSpec((None, None, None, page_size), lambda page, part, row: (row, part, page, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, kv_heads * tiles, pages, page_size), jnp.float32),
        name="token_scoring_mass",
    )(grouped, key_pool, page_table, lengths, peak, jnp.maximum(mass, 1e-30))
    by_row = by_row.reshape(rows, kv_heads * tiles, pages * page_size)
    by_row = jnp.sum(by_row, axis=1) / heads if reduce == "mean" else jnp.max(by_row, axis=1)
    return jnp.mean(by_row, axis=0)


def _page_scores(query_ref, key_ref, table_ref, length_ref, page_size: int, scale: float, tiles: int):
    """Scores f32[tile, page_size] of the program's page and which of its tokens are below the length."""
    page, head = pl.program_id(0), jax.lax.div(pl.program_id(1), tiles)
    query = query_ref[...]
    precision = precision_of(query)
    key = plt.load(key_ref.at[pl.ds(table_ref[page] * page_size, page_size), head, :])
    scores = plt.dot(query, key, trans_b=True, precision=precision) * scale
    token = page * page_size + jax.lax.broadcasted_iota(jnp.int32, (1, page_size), 1)
    inside = jnp.broadcast_to(token < length_ref[0], scores.shape)
    return jnp.where(inside, scores, LOWEST), inside


def _statistics_kernel(
    query_ref, key_ref, table_ref, length_ref, highest_ref, total_ref, *, page_size, scale, tiles
) -> None:
    scores, inside = _page_scores(query_ref, key_ref, table_ref, length_ref, page_size, scale, tiles)
    highest = jnp.max(scores, axis=1)
    highest_ref[...] = highest
    total_ref[...] = jnp.sum(jnp.where(inside, jnp.exp(scores - highest[:, None]), 0.0), axis=1)


def _mass_kernel(
    query_ref, key_ref, table_ref, length_ref, peak_ref, mass_ref, out_ref, *, group, reduce, page_size, scale, tiles
) -> None:
    scores, inside = _page_scores(query_ref, key_ref, table_ref, length_ref, page_size, scale, tiles)
    share = jnp.exp(scores - peak_ref[...][:, None]) / mass_ref[...][:, None]
    first = jax.lax.rem(pl.program_id(1), tiles) * scores.shape[0]
    real = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) < group
    share = jnp.where(inside & real, share, 0.0)
    out_ref[...] = jnp.sum(share, axis=0) if reduce == "mean" else jnp.max(share, axis=0)
