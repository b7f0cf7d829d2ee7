"""Attention of a block of query rows over paged KV: the public name."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.block_attention import chunk_mosaic, mosaic, reference, triton
from pallas_kernels.block_attention.ancestry import MOST_ROWS, Ancestry
from pallas_kernels.hopper import on_hopper
from pallas_kernels.implementations import choose
from pallas_kernels.paged import why_not

IMPLEMENTATIONS = {"reference": reference, "triton": triton, "mosaic": mosaic, "chunk_mosaic": chunk_mosaic}
HOPPER = ("mosaic", "chunk_mosaic")
"""Those for Hopper cards; no two take the same arguments."""


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
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Mixes values for T query rows of each of B slots.

    Query t of slot b has token index `starts[b] + t`; token index j lives in pool row
    `page_table[b, j // page_size] * page_size + j % page_size`, and the rows' own K and V are already there. The query
    sees key j iff `j <= starts[b] + t` (causal) or `j < starts[b] + T` (not causal), and `starts[b] + t - j < window`
    where a window is given. With `ring` the table goes round: token index j lives in the page of column
    `(j // page_size) % P`, which must be the right one for all that the rows see. Softmax in f32 of `scale * q.k`; a
    row that sees nothing gives zeros. Pools hold finite numbers everywhere.

    Rows that form a `tree` (MOST_ROWS at most) are stored in their order all the same. A row at depth d then has token
    index `starts[b] + d`, and of the block's rows it sees itself and its ancestors only. Its result has the bits that
    it would have in a chain of these.

    Queries are as wide as keys and values (Q = K = D). In the `compact` form a token's key is its K numbers followed
    by its D values (Q = K + D): for layers whose keys are, but for a few dims, what their values are.

    A row's result is bit-equal whatever the other rows and slots hold. Raises NotImplementedError when a named
    implementation cannot take these arguments, ValueError when shapes do not fit.
    """
    _check(queries, key_pool, value_pool, page_size, compact)
    if ring and window is None:
        raise ValueError("a ring of pages holds no more than a window: give the window")
    if tree is not None and not (causal and queries.shape[1] <= MOST_ROWS):
        raise ValueError(f"rows of a tree are causal and {MOST_ROWS} at most, got {queries.shape[1]}, causal {causal}")
    fits = why_not(page_size, key_pool.shape[2], value_pool.shape[2]) is None
    chosen = choose("block_attention", implementation, triton_fits=fits, known=tuple(IMPLEMENTATIONS))
    if implementation is None:
        options = {"page_size": page_size, "window": window, "causal": causal, "compact": compact}
        options["tree"] = tree is not None
        for name in HOPPER if on_hopper() else ():
            if IMPLEMENTATIONS[name].why_not(queries, key_pool, value_pool, **options) is None:
                chosen = name
    return IMPLEMENTATIONS[chosen].block_attention(
        queries,
        key_pool,
        value_pool,
        page_table,
        starts,
        tree,
        page_size=page_size,
        scale=scale,
        window=window,
        causal=causal,
        ring=ring,
        compact=compact,
    )


def _check(queries: Array, key_pool: Array, value_pool: Array, page_size: int, compact: bool) -> None:
    heads, width = queries.shape[2:]
    if key_pool.shape[0] % page_size or value_pool.shape[0] % page_size:
        raise ValueError(f"pools have {key_pool.shape[0]} rows, expected whole pages of {page_size}")
    keys, values = key_pool.shape[2], value_pool.shape[2]
    fitting = width == keys + values if compact else width == keys == values
    if key_pool.shape[:2] != value_pool.shape[:2] or not fitting or heads % key_pool.shape[1]:
        wanted = "queries as wide as keys and values together" if compact else "one width for all"
        raise ValueError(
            f"queries have {heads} heads of {width}, pools {key_pool.shape} and {value_pool.shape}: "
            f"expected pools [tokens, kv_heads, width] with kv_heads dividing heads, and {wanted}"
        )
