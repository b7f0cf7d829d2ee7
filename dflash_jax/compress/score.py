"""How much the question attends to each prompt token: the measure by which PFlash keeps tokens.

The scorer runs the prompt through its first layers in chunks, then the question's tokens once more at the very end, where they
see everything. A token's score is the attention that the question's rows pay to it, averaged over rows, heads and a few layers
(attention mass, Speculative Prefill, arXiv 2502.02789). Attention goes page by page: nothing of size [heads, S, S] exists.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import ModelConfig
from dflash_jax.models.decoder import Decoder, Place
from dflash_jax.models.layers import KvPool
from pallas_kernels.token_scoring.api import token_scores

QUESTION_ROWS = 32
"""Rows that ask; a shorter question is repeated to fill them."""


@dataclasses.dataclass(frozen=True)
class Depth:
    """How far into its layers a scorer runs, and which layers' attention counts."""

    num_layers: int
    scoring_layers: tuple[int, ...]


def early_exit(config: ModelConfig) -> Depth:
    """The target as its own scorer: about a quarter of its layers (docs/pflash.md has the recall at other depths)."""
    return _upper_half(max(2, round(config.num_layers / 4)))


def full_depth(config: ModelConfig) -> Depth:
    """A scorer model of its own: all layers but the last ones, which care for the next token only."""
    return _upper_half(max(2, round(config.num_layers * 0.75)))


def _upper_half(num_layers: int) -> Depth:
    return Depth(num_layers, tuple(range(num_layers // 2, num_layers)))


def read_chunk(
    scorer: Decoder,
    pools: tuple[KvPool, ...],
    tokens: Int[Array, "slots rows"],
    positions: Int[Array, "slots rows"],
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    *,
    depth: Depth,
    page_size: int,
) -> tuple[KvPool, ...]:
    """Stores the K and V of one chunk of prompt in the scorer's first layers."""
    place = Place(page_table, starts, positions, page_size)
    return scorer(tokens, pools, place, num_layers=depth.num_layers).pools


def score_tokens(
    scorer: Decoder,
    pools: tuple[KvPool, ...],
    question: Int[Array, "1 rows"],
    positions: Int[Array, "1 rows"],
    page_table: Int[Array, "1 pages"],
    length: Int[Array, " 1"],
    *,
    depth: Depth,
    page_size: int,
) -> tuple[Float[Array, " tokens"], tuple[KvPool, ...]]:
    """Scores f32[pages * page_size] of the `length` tokens that the pools hold; zero beyond."""
    place = Place(page_table, length, positions, page_size)
    passed = scorer(question, pools, place, num_layers=depth.num_layers, capture_queries=True)
    scores = [
        token_scores(
            passed.queries[layer][0],
            passed.pools[layer][0],
            page_table[0],
            length[0],
            page_size=page_size,
            scale=scorer.config.layers[layer].attention_scale,
        )
        for layer in depth.scoring_layers
    ]
    return jnp.mean(jnp.stack(scores), axis=0), passed.pools
