"""How much the question attends to each prompt token: the measure by which PFlash keeps tokens.

The scorer runs the prompt through its first layers in chunks and keeps their keys, then runs the question once more at
the very end, where it sees everything. A layer's score of a token is the largest attention that any head of any
question row pays to it, computed without RoPE, so that where a token stands says nothing about it. (Attention mass is
the idea of Speculative Prefill, arXiv 2502.02789; docs/pflash.md has what leaving out RoPE, the maxima and the depth
bring.) Attention goes page by page: nothing of size [heads, S, S] exists.

With `Sparse`, rows of a long prompt read only the blocks of keys that matter to them. Blocks are selected by their
mean keys, which are kept while the prompt is read: 1/128 of its keys, of which no session, fork or copy of a page has
to know. A prefix whose keys are in the pools already has its means made from the pages once, when reading begins.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import ModelConfig
from dflash_jax.models.decoder import Decoder, Place, SparseReading
from dflash_jax.models.layers import KvPool
from pallas_kernels.sparse_attention.api import SelectionRule, update_means
from pallas_kernels.token_scoring.api import token_scores

QUESTION_ROWS = 32
"""Rows that ask; a shorter question is repeated to fill them."""

Keys = tuple[Float[Array, "tokens kv_heads head_dim"], ...]
"""Keys without RoPE of the new tokens, one buffer per scoring layer."""
Means = dict[int, Float[Array, "1 blocks kv_heads key_width"]]
"""By layer, the mean key of each block of the tokens read so far; nothing if the prompt is read densely."""


class Reading(NamedTuple):
    """What is kept of a prompt while it is read."""

    keys: Keys
    means: Means


@dataclasses.dataclass(frozen=True)
class Sparse:
    """How a scorer reads prompts of `least_tokens` or more, in layers without a window; shorter ones are read densely.

    A prompt of 4,096 tokens is 32 blocks, of which each row reads six or more whatever they hold: below that, selecting
    costs more than it saves. (FlashPrefill, arXiv 2603.06199, gains 1.7x at 4K and keeps 70 % of the blocks there.)
    """

    rule: SelectionRule = dataclasses.field(default_factory=SelectionRule)
    least_tokens: int = 4096


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


def sparse_layers(config: ModelConfig, depth: Depth) -> tuple[int, ...]:
    """Layers that a scorer can read sparsely: those that run, have K and V of their own and no window."""
    own = config.own_layers[: depth.num_layers]
    return tuple(index for index, layer in enumerate(own) if layer.window is None)


def means_of_prefix(
    pools: tuple[KvPool, ...],
    page_table: Int[Array, "1 pages"],
    ends: Int[Array, " 1"],
    *,
    config: ModelConfig,
    depth: Depth,
    sparse: Sparse,
    page_size: int,
) -> Means:
    """The means of the first `ends` tokens of a sequence, for all layers that are read sparsely."""
    tokens, block_size = page_table.shape[1] * page_size, sparse.rule.block_size
    means = {}
    for index in sparse_layers(config, depth):
        layer, (keys, values) = config.layers[index], pools[index]
        compact = config.key_width(layer) < layer.head_dim
        width = keys.shape[2] + (values.shape[2] if compact else 0)
        means[index] = update_means(
            jnp.zeros((1, tokens // block_size, layer.num_kv_heads, width), keys.dtype),
            keys,
            values,
            page_table,
            jnp.zeros_like(ends),
            ends,
            most=tokens,
            page_size=page_size,
            block_size=block_size,
        )
    return means


def read_chunk(
    scorer: Decoder,
    pools: tuple[KvPool, ...],
    reading: Reading,
    tokens: Int[Array, "1 rows"],
    positions: Int[Array, "1 rows"],
    page_table: Int[Array, "1 pages"],
    starts: Int[Array, " 1"],
    first: Int[Array, ""],
    lengths: Int[Array, " 1"],
    ring_table: Int[Array, "1 ring_pages"] | None = None,
    *,
    depth: Depth,
    sparse: Sparse | None,
    page_size: int,
) -> tuple[tuple[KvPool, ...], Reading]:
    """The scorer reads one chunk of a prompt of `lengths` tokens.

    Its keys go to `first..` of the buffers, which must have room for all rows. It is read sparsely if there are means.
    """
    by_blocks = SparseReading(sparse.rule, lengths, reading.means) if sparse and reading.means else None
    place = Place(page_table, starts, positions, page_size, ring_table, by_blocks)
    passed = scorer(tokens, pools, place, num_layers=depth.num_layers, unrotated=depth.scoring_layers)
    new_keys = tuple(
        jax.lax.dynamic_update_slice_in_dim(buffer, key[0].astype(buffer.dtype), first, axis=0)
        for buffer, (_, key) in zip(reading.keys, passed.unrotated, strict=True)
    )
    return passed.pools, Reading(new_keys, dict(passed.means))


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
