"""Causal attention of prompt rows that reads only the blocks of keys that matter: the public names.

Source: FlashPrefill (arXiv 2603.06199). For scoring prompts only: at 128K it loses facts that dense attention finds.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import on_hopper
from pallas_kernels.implementations import choose
from pallas_kernels.paged import why_not
from pallas_kernels.sparse_attention import mosaic, reference, triton
from pallas_kernels.sparse_attention.selection import Selection, SelectionRule, update_means

__all__ = [
    "Selection",
    "SelectionRule",
    "attend_blocks",
    "select_blocks",
    "sparse_attention",
    "update_means",
]

ATTENDING = {"reference": reference, "triton": triton, "mosaic": mosaic}
HOPPER = ("mosaic",)
"""Those of ATTENDING for Hopper cards."""


def sparse_attention(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    means: Float[Array, "B N kv_heads Q"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    page_size: int,
    scale: float,
    rule: SelectionRule,
    compact: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Selects blocks of keys for T prompt rows of each of B slots, and mixes their values.

    Arguments and errors are those of `select_blocks` and `attend_blocks`.
    """
    selection = select_blocks(
        queries,
        means,
        starts,
        lengths,
        scale=scale,
        rule=rule,
        key_dim=key_pool.shape[2] if compact else None,
        implementation=implementation,
    )
    return attend_blocks(
        queries,
        key_pool,
        value_pool,
        page_table,
        starts,
        selection,
        page_size=page_size,
        scale=scale,
        block_size=rule.block_size,
        compact=compact,
        implementation=implementation,
    )


def select_blocks(
    queries: Float[Array, "B T H Q"],
    means: Float[Array, "B N kv_heads Q"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    rule: SelectionRule,
    key_dim: int | None = None,
    implementation: str | None = None,
) -> Selection:
    """The blocks of keys that each query block of each head reads.

    Row t of slot b has token index `starts[b] + t`; rows from `lengths[b]` on (the prompt's length) are padding. A
    query block is `rule.block_size` rows, counted from the first row. `means[b, j]` is the mean key of block j,
    `update_means` makes it. A row gives block j the score `scale * q.mean` if the block begins at or before the row;
    a block's mass is the sum over rows of exp(score - largest score of the query block), and it is kept by the rule.
    (FlashPrefill normalises masses to a sum of 1, which changes no comparison.) A query block of padding keeps
    nothing. Compact queries and means (block_attention) say with `key_dim` where keys end and values begin.

    Slots do not depend on each other. `implementation` is reference or triton. Raises NotImplementedError when a named
    one cannot take these arguments, ValueError when shapes do not fit.
    """
    if means.shape[3] != queries.shape[3] or queries.shape[2] % means.shape[2]:
        raise ValueError(
            f"queries have {queries.shape[2]} heads of {queries.shape[3]}, means are {means.shape}: "
            "expected means [slots, blocks, kv_heads, width] with kv_heads dividing heads"
        )
    widths = [queries.shape[3]] if key_dim is None else [key_dim, queries.shape[3] - key_dim]
    fits = why_not(rule.block_size, *widths) is None
    if choose("select_blocks", implementation, triton_fits=fits) == "triton":
        return triton.select_blocks(queries, means, starts, lengths, scale=scale, rule=rule, key_dim=key_dim)
    return reference.select_blocks(queries, means, starts, lengths, scale=scale, rule=rule)


def attend_blocks(
    queries: Float[Array, "B T H Q"],
    key_pool: Float[Array, "tokens kv_heads K"],
    value_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, " B"],
    selection: Selection,
    *,
    page_size: int,
    scale: float,
    block_size: int,
    compact: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention in f32 over the selected blocks of paged KV, up to each row itself.

    Pools, table, starts and the compact form are those of `block_attention`; blocks lie whole in pages. A row whose
    query block has no blocks gives zeros. Slots do not depend on each other, and a row depends on its query block only
    through the selection. `implementation` is reference, triton or mosaic; None picks mosaic on a Hopper card and
    triton on other GPUs for what they take. Raises NotImplementedError when a named one cannot take these arguments,
    ValueError when shapes do not fit.
    """
    keys, values = key_pool.shape[2], value_pool.shape[2]
    width, heads = queries.shape[3], queries.shape[2]
    if width != (keys + values if compact else keys) or heads % key_pool.shape[1]:
        raise ValueError(
            f"queries have {heads} heads of {width}, pools {key_pool.shape} and {value_pool.shape}: "
            "expected pools [tokens, kv_heads, width] with kv_heads dividing heads"
        )
    if page_size % block_size or key_pool.shape[0] % page_size:
        raise ValueError(
            f"pools have {key_pool.shape[0]} rows in pages of {page_size}: expected whole pages of whole blocks of "
            f"{block_size}"
        )
    fits = why_not(page_size, block_size, keys, values) is None
    chosen = choose("attend_blocks", implementation, triton_fits=fits, known=tuple(ATTENDING))
    if implementation is None and on_hopper():
        sizes = {"block_size": block_size, "compact": compact}
        if mosaic.why_not(key_pool, value_pool, **sizes) is None:
            chosen = "mosaic"
    return ATTENDING[chosen].attend_blocks(
        queries,
        key_pool,
        value_pool,
        page_table,
        starts,
        selection,
        page_size=page_size,
        scale=scale,
        block_size=block_size,
        compact=compact,
    )
