"""Attention mass that a few query rows pay to every prompt token: the public name."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import choose
from pallas_kernels.paged import why_not
from pallas_kernels.token_scoring import reference, triton

REDUCTIONS = ("mean", "max")


def token_scores(
    queries: Float[Array, "R H D"],
    key_pool: Float[Array, "tokens kv_heads D"],
    page_table: Int[Array, " P"],
    length: Int[Array, ""],
    *,
    page_size: int,
    scale: float,
    reduce: str = "mean",
    implementation: str | None = None,
) -> Float[Array, " scores"]:
    """Scores f32[P * page_size]: softmax of `scale * q.k` over keys j < length per (row, head), reduced over heads
    by `reduce` ("mean" or "max"), mean over rows; zero from `length` on.

    Token index j lives in pool row `page_table[j // page_size] * page_size + j % page_size`. Source: attention mass of
    Speculative Prefill (arXiv 2502.02789). Memory beyond the result is that of one page. Raises NotImplementedError
    when a named implementation cannot take these arguments, ValueError when shapes do not fit.
    """
    heads, head_dim = queries.shape[1:]
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}: use one of {REDUCTIONS}")
    if key_pool.shape[0] % page_size or key_pool.shape[2] != head_dim or heads % key_pool.shape[1]:
        raise ValueError(
            f"queries have {heads} heads of {head_dim}, the pool is {key_pool.shape}: "
            f"expected whole pages of {page_size} with kv_heads dividing heads"
        )
    implementation = choose("token_scores", implementation, triton_fits=why_not(page_size, queries.shape[-1]) is None)
    chosen = triton if implementation == "triton" else reference
    return chosen.token_scores(queries, key_pool, page_table, length, page_size=page_size, scale=scale, reduce=reduce)
