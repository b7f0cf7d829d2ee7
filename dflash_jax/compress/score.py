"""How much the question attends to each prompt token: the measure by which PFlash keeps tokens.

The scorer runs the prompt through its first layers in chunks and keeps their keys, then runs the question once more at
the very end, where it sees everything. A layer's score of a token is the largest attention that any head of any
question row pays to it, computed without RoPE, so that where a token stands says nothing about it. (Attention mass is
the idea of Speculative Prefill, arXiv 2502.02789; docs/pflash.md has what leaving out RoPE, the maxima and the depth
bring.) Attention goes page by page: nothing of size [heads, S, S] exists.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import ModelConfig
from dflash_jax.models.decoder import Decoder, Place
from dflash_jax.models.layers import KvPool
from pallas_kernels.token_scoring.api import token_scores

QUESTION_ROWS = 32
"""Rows that ask; a shorter question is repeated to fill them."""

Keys = tuple[Float[Array, "tokens kv_heads head_dim"], ...]
"""Keys without RoPE of the new tokens, one buffer per scoring layer."""


@dataclasses.dataclass(frozen=True)
class Depth:
    """How far a scorer runs: `num_layers` whole layers, then only queries and keys of the next one."""

    num_layers: int

    @property
    def scoring_layers(self) -> tuple[int, ...]:
        """Layers whose attention counts."""
        return tuple(range(self.num_layers + 1))


def early_exit(config: ModelConfig) -> Depth:
    """The target as its own scorer: the first tenth of its layers finds a planted fact (docs/pflash.md)."""
    return Depth(min(max(2, round(config.num_layers / 10)), config.num_layers - 1))


def full_depth(config: ModelConfig) -> Depth:
    """A scorer model of its own: half of its layers; the upper ones care for the next token."""
    return Depth(min(max(2, config.num_layers // 2), config.num_layers - 1))


def empty_keys(config: ModelConfig, depth: Depth, *, tokens: int, dtype: DTypeLike) -> Keys:
    """Zeroed buffers for the keys of so many tokens."""
    layers = [config.layers[index] for index in depth.scoring_layers]
    return tuple(jnp.zeros((tokens, layer.num_kv_heads, layer.head_dim), dtype) for layer in layers)


def read_chunk(
    scorer: Decoder,
    pools: tuple[KvPool, ...],
    keys: Keys,
    tokens: Int[Array, "1 rows"],
    positions: Int[Array, "1 rows"],
    page_table: Int[Array, "1 pages"],
    starts: Int[Array, " 1"],
    first: Int[Array, ""],
    ring_table: Int[Array, "1 ring_pages"] | None = None,
    *,
    depth: Depth,
    page_size: int,
) -> tuple[tuple[KvPool, ...], Keys]:
    """The scorer reads one chunk; its keys go to `first..` of the buffers, which must have room for all rows."""
    place = Place(page_table, starts, positions, page_size, ring_table)
    passed = scorer(tokens, pools, place, num_layers=depth.num_layers, unrotated=depth.scoring_layers)
    new_keys = tuple(
        jax.lax.dynamic_update_slice_in_dim(buffer, key[0].astype(buffer.dtype), first, axis=0)
        for buffer, (_, key) in zip(keys, passed.unrotated, strict=True)
    )
    return passed.pools, new_keys


def score_tokens(
    scorer: Decoder,
    pools: tuple[KvPool, ...],
    keys: Keys,
    question: Int[Array, "1 rows"],
    positions: Int[Array, "1 rows"],
    page_table: Int[Array, "1 pages"],
    starts: Int[Array, " 1"],
    length: Int[Array, ""],
    ring_table: Int[Array, "1 ring_pages"] | None = None,
    *,
    depth: Depth,
    page_size: int,
) -> tuple[Float[Array, "layers tokens"], tuple[KvPool, ...]]:
    """Each scoring layer's scores of the first `length` tokens of the key buffers; zero beyond."""
    place = Place(page_table, starts, positions, page_size, ring_table)
    passed = scorer(question, pools, place, num_layers=depth.num_layers, unrotated=depth.scoring_layers)
    pages = jnp.arange(keys[0].shape[0] // page_size, dtype=jnp.int32)
    scores = [
        token_scores(
            _rows_as_heads(queries[0], buffer.shape[1]),
            buffer,
            pages,
            length,
            page_size=page_size,
            scale=scorer.config.layers[layer].attention_scale,
            reduce="max",
        )
        for layer, (queries, _), buffer in zip(depth.scoring_layers, passed.unrotated, keys, strict=True)
    ]
    return jnp.stack(scores), passed.pools


def _rows_as_heads(
    queries: Float[Array, "rows heads head_dim"], kv_heads: int
) -> Float[Array, "1 rows_and_heads head_dim"]:
    """One row with the heads of all rows, heads of one KV head side by side.

    A maximum over heads is one over rows too.
    """
    rows, heads, head_dim = queries.shape
    grouped = queries.reshape(rows, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 2, 3)
    return grouped.reshape(1, rows * heads, head_dim)
