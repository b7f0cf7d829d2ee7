"""One decoder for every target family: embedding, layers, head. What differs between families is data in `ModelConfig`.

All passes (prefill chunk, decode step, verify, scoring) are one function, `Decoder.__call__`: rows of one or more slots
enter at given token indices, their K and V are written to the pools, and they attend to what the pools hold up to
themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import LayerConfig, ModelConfig
from dflash_jax.models.experts import Experts
from dflash_jax.models.layers import (
    GatedMlp,
    KvPool,
    Linear,
    Parts,
    RMSNorm,
    SparsePool,
    Stream,
    Weight,
    below,
    dense,
    rope_tables,
)
from dflash_jax.models.per_layer import PerLayerEmbedding, PerLayerGate
from pallas_kernels.attention_rows.api import HeadLayout, HeadNorms, attention_rows, normed_heads
from pallas_kernels.block_attention.ancestry import Ancestry
from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.quantised_matmul import api as quantised_matmul
from pallas_kernels.sparse_attention.api import SelectionRule, sparse_attention, update_means


@dataclasses.dataclass(frozen=True)
class SparseReading:
    """Rows of long prompts that need not read every key: which blocks they do, by `rule` and the prompts' `lengths`.

    `means` has, by layer, the mean key of each block of the tokens read so far; layers that are not there read all.
    """

    rule: SelectionRule
    lengths: Int[Array, " slots"]
    means: Mapping[int, Float[Array, "slots blocks _kv_heads _width"]]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where rows stand: their slots' page tables, the token index of each slot's first row, RoPE positions of all rows.

    Token index (where K and V are stored, what masks compare) and position (what RoPE sees) differ in a pruned prompt.
    With a `ring_table` (models/ring.py) layers with a window have pools of their own, whose pages it names.
    """

    page_table: Int[Array, "slots pages"]
    starts: Int[Array, " slots"]
    positions: Int[Array, "slots rows"]
    page_size: int
    ring_table: Int[Array, "slots ring_pages"] | None = None
    sparse: SparseReading | None = None
    tree: Ancestry | None = None
    """What rows see of each other where they are no chain; K and V are stored in the order of rows all the same."""
    source: Int[Array, " _all_rows"] | None = None
    """Experts treat the r-th of all rows as the `source[r]`-th: rows that nobody reads need no experts of their own."""

    def table(self, layer: LayerConfig) -> tuple[Int[Array, "slots _pages"], bool]:
        """The page table that a layer goes by, and whether it is a ring."""
        if layer.window is None or self.ring_table is None:
            return self.page_table, False
        return self.ring_table, True


QueriesKeys = tuple[Float[Array, "slots rows heads _head_dim"], Float[Array, "slots rows _kv_heads _head_dim"] | None]
"""Before RoPE. A layer that reads another one's K and V has no keys itself."""
Unrotated = tuple[Float[Array, "slots rows heads _head_dim"], Float[Array, "slots rows _kv_heads _head_dim"]]
"""The same with the other one's keys."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a pass through the decoder leaves behind.

    `hidden` is the residual stream after the last layer that ran, before the final norm. `features` are the residual
    streams after the captured layers, concatenated. `unrotated` has queries and keys before RoPE of the layers
    asked for, in that order; for a layer that reads another one's K and V, the other one's keys. `means` are those of
    `Place.sparse` with the rows' own keys.
    """

    hidden: Float[Array, "slots rows dim"]
    pools: tuple[KvPool, ...]
    features: Float[Array, "slots rows features"] | None
    unrotated: tuple[Unrotated, ...]
    means: Mapping[int, Float[Array, "slots _blocks _kv_heads _width"]]


class Attention(nnx.Module):
    """Grouped-query attention over the pool, with the family's norms on q, k and v.

    A layer with a `kv_source` has queries only and reads the pool of that layer.
    """

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig, layer: LayerConfig) -> None:
        own = layer.kv_source is None
        names = ("q", *(("k",) if layer.values_are_keys else ("k", "v"))) if own else ("q",)
        bias = jnp.concatenate([dense(parameters[f"{name}_bias"]) for name in names]) if config.attention_bias else None
        self.qkv = Linear(quantised_matmul.concatenate([parameters[name] for name in names]), bias)
        self.out = Linear(parameters["o"], dense(parameters["o_bias"]) if config.output_bias else None)
        norm = {"eps": config.norm_eps, "offset": config.norm_offset}
        self.q_norm = RMSNorm(dense(parameters["q_norm"]), **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(dense(parameters["k_norm"]), **norm) if config.qk_norm and own else None
        self.norm_values = config.v_norm and own
        self.eps = config.norm_eps
        self.layer = layer
        self.layout = HeadLayout(
            heads=config.num_heads,
            kv_heads=layer.num_kv_heads if own else 0,
            head_dim=layer.head_dim,
            key_width=config.key_width(layer),
            values_are_keys=layer.values_are_keys,
        )

    def project(self, x: Float[Array, "slots rows dim"]) -> QueriesKeys:
        """Queries and keys with their norms, before RoPE; no keys where another layer provides them."""
        return self._before_rope(self.qkv.parts(x), x)

    def __call__(
        self, x: Float[Array, "slots rows dim"], rope: tuple[Array, Array], pool: KvPool | SparsePool, place: Place
    ) -> tuple[Parts, KvPool | SparsePool, QueriesKeys]:
        """The mix, the pool with the rows' own K and V, and queries and own keys before RoPE."""
        parts = self.qkv.parts(x)
        table, ring = place.table(self.layer)
        owned = (pool[0], pool[1]) if self.layout.kv_heads else None
        queries, written = attention_rows(
            parts,
            owned,
            table,
            place.starts,
            rope,
            layout=self.layout,
            norms=self._norms,
            dtype=x.dtype,
            page_size=place.page_size,
            ring=ring,
        )
        kv = (pool[0], pool[1]) if written is None else written
        sizes = {"page_size": place.page_size, "scale": self.layer.attention_scale, "compact": self.layout.compact}
        if isinstance(pool, SparsePool):
            pool = self._with_means(SparsePool(*kv, pool.means), place, queries.shape[1])
            mixed = self._read_sparsely(queries, pool, place, **sizes)
        else:
            pool, ringed = kv, {"window": self.layer.window, "ring": ring}
            mixed = block_attention(queries, *kv, table, place.starts, place.tree, **ringed, **sizes)
        return self.out.parts(mixed.reshape(*x.shape[:2], -1)), pool, self._before_rope(parts, x)

    def _before_rope(self, parts: Parts, x: Float[Array, "slots rows dim"]) -> QueriesKeys:
        queries, keys, _ = normed_heads(parts, layout=self.layout, norms=self._norms, dtype=x.dtype)
        return queries, keys if self.layout.kv_heads else None

    @property
    def _norms(self) -> HeadNorms:
        queries, keys = (None if norm is None else norm.scale_value for norm in (self.q_norm, self.k_norm))
        return HeadNorms(queries, keys, self.norm_values, self.eps)

    def _with_means(self, pool: SparsePool, place: Place, rows: int) -> SparsePool:
        """The pool, where the rows' own keys are already, with the means of the blocks that they lie in."""
        assert place.sparse is not None
        means = update_means(
            pool.means,
            pool.keys,
            pool.values,
            place.page_table,
            place.starts,
            jnp.minimum(place.starts + rows, place.sparse.lengths),  # padding has no part in a mean
            most=rows,
            page_size=place.page_size,
            block_size=place.sparse.rule.block_size,
        )
        return pool._replace(means=means)

    def _read_sparsely(
        self, queries: Float[Array, "slots rows heads _width"], pool: SparsePool, place: Place, **sizes: Any
    ) -> Float[Array, "slots rows heads _head_dim"]:
        assert place.sparse is not None
        where = (place.page_table, place.starts, place.sparse.lengths)
        return sparse_attention(queries, *pool, *where, rule=place.sparse.rule, **sizes)


class FeedForward(nnx.Module):
    """Gated MLP with pre-norm, and the family's post-norm; beside it experts, whose router reads the same residual."""

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig) -> None:
        norm = {"eps": config.norm_eps, "offset": config.norm_offset}
        self.norm = RMSNorm(dense(parameters["mlp_norm"]), **norm)
        self.mlp = GatedMlp(
            parameters["mlp.gate"], parameters["mlp.up"], parameters["mlp.down"], activation=config.activation
        )
        self.post_norm = RMSNorm(dense(parameters["mlp_post_norm"]), **norm) if config.sandwich_norms else None
        experts = below(parameters, "experts.")
        beside = "mlp.dense_post_norm"
        self.experts = Experts(experts, dense(parameters[beside]), config) if config.experts else None

    def __call__(self, stream: Stream, source: Int[Array, " _all_rows"] | None = None) -> Stream:
        """`source` is that of `Place`."""
        stream, normed = stream.normed(self.norm)
        parts = self.mlp.parts(normed)
        if self.experts is not None:
            parts = self.experts(stream.value, parts, source)[None]
        return Stream(stream.value, parts, self.post_norm)


class DecoderLayer(nnx.Module):
    """Attention, feed-forward and, where the family has them, per-layer embeddings and a scalar at the end."""

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig, layer: LayerConfig) -> None:
        norm = {"eps": config.norm_eps, "offset": config.norm_offset}
        self.attention_norm = RMSNorm(dense(parameters["attention_norm"]), **norm)
        self.attention = Attention(below(parameters, "attention."), config, layer)
        sandwich = config.sandwich_norms
        self.attention_post_norm = RMSNorm(dense(parameters["attention_post_norm"]), **norm) if sandwich else None
        self.feed_forward = FeedForward(parameters, config)
        self.per_layer = PerLayerGate(below(parameters, "per_layer."), config) if config.per_layer_width else None
        self.scalar = nnx.Param(dense(parameters["scalar"])) if config.layer_scalar else None

    def __call__(
        self,
        stream: Stream,
        rope: tuple[Array, Array],
        pool: KvPool | SparsePool,
        place: Place,
        per_layer: Float[Array, "slots rows width"] | None = None,
    ) -> tuple[Stream, KvPool | SparsePool, QueriesKeys]:
        """The stream after the layer, the pool, and what `Attention` says of queries and keys."""
        stream, normed = stream.normed(self.attention_norm)
        mixed, pool, unrotated = self.attention(normed, rope, pool, place)
        stream = self.feed_forward(Stream(stream.value, mixed, self.attention_post_norm), place.source)
        if self.per_layer is not None and per_layer is not None:
            x = stream.settled().value
            stream = self.per_layer(x, per_layer)
        factor = None if self.scalar is None else self.scalar.get_value()
        return dataclasses.replace(stream, factor=factor), pool, unrotated


class Decoder(nnx.Module):
    """A target or scorer. `parameters` go by the names of `models.parameters.target_parameters`."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Weight], *, dtype: DTypeLike) -> None:
        self.config = config
        self.dtype = dtype
        self.embedding = nnx.Param(parameters["embed"])
        self.per_layer = PerLayerEmbedding(below(parameters, "per_layer."), config) if config.per_layer_width else None
        self.layers = nnx.List(
            [
                DecoderLayer(below(parameters, f"layers.{index}."), config, layer)
                for index, layer in enumerate(config.layers)
            ]
        )
        self.final_norm = RMSNorm(dense(parameters["final_norm"]), eps=config.norm_eps, offset=config.norm_offset)
        self.head = None if config.tied_embeddings else Linear(parameters["lm_head"])

    def embed(self, tokens: Int[Array, "slots rows"]) -> Float[Array, "slots rows dim"]:
        """Rows of the embedding table, scaled as the family wants it (the factor is rounded to the compute dtype)."""
        rows = quantised_matmul.take_rows(self.embedding.get_value(), tokens, self.config.hidden_size)
        return rows.astype(self.dtype) * jnp.asarray(self.config.embedding_scale, self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "slots rows"],
        pools: Sequence[KvPool],
        place: Place,
        *,
        num_layers: int | None = None,
        capture: Sequence[int] = (),
        unrotated: Sequence[int] = (),
    ) -> Pass:
        """Runs the first `num_layers` layers (all when None) on rows of tokens.

        `capture` names layers for `Pass.features`, `unrotated` layers for `Pass.unrotated`; the latter may include the
        first layer that does not run, of which only queries and keys are computed.
        """
        stream = Stream(self.embed(tokens))
        per_layer = None if self.per_layer is None else self.per_layer(tokens, stream.value)
        tables = {}
        means = dict(place.sparse.means) if place.sparse else {}
        at_hand: list[KvPool | SparsePool] = [
            SparsePool(*pool, means[index]) if index in means else pool for index, pool in enumerate(pools)
        ]
        features = {}
        taken: dict[int | None, Unrotated] = {}
        for index, layer in enumerate(self.config.layers[:num_layers]):
            key = (layer.rope, layer.head_dim)
            if key not in tables:
                tables[key] = rope_tables(*key, place.positions)
            source = index if layer.kv_source is None else layer.kv_source
            own = None if per_layer is None else per_layer[:, :, index]
            stream, at_hand[source], (q, k) = self.layers[index](stream, tables[key], at_hand[source], place, own)
            taken[index] = (q, taken[source][1] if k is None else k)
            if index in capture:
                # Aside: the stream goes on as it would in a pass without captures, bit for bit.
                features[index] = stream.settled().value
        stream = stream.settled()
        if num_layers is not None and num_layers in unrotated:
            layer = self.layers[num_layers]
            q, k = layer.attention.project(layer.attention_norm(stream.value))
            taken[num_layers] = (q, taken[self.config.layers[num_layers].kv_source][1] if k is None else k)
        joined = jnp.concatenate([features[index] for index in capture], axis=-1) if capture else None
        new_pools = tuple((pool[0], pool[1]) for pool in at_hand)
        means = {index: pool.means for index, pool in enumerate(at_hand) if isinstance(pool, SparsePool)}
        return Pass(stream.value, new_pools, joined, tuple(taken[index] for index in unrotated), means)

    def logits(self, hidden: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Final norm, head, softcap; f32. `hidden` is the residual stream after the last layer."""
        return self.project(self.final_norm(hidden))

    def project(self, normed: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Head and softcap alone, for hidden states that carry their own final norm (the drafter's)."""
        scores = self.capped(quantised_matmul.matmul(normed, self.head_weight).astype(jnp.float32))
        never = self.config.suppressed_ids
        return scores.at[..., jnp.asarray(never)].set(-jnp.inf) if never else scores

    def head_rows(self, ids: Int[Array, "slots rows"]) -> Float[Array, "slots rows dim"]:
        """The head's weights for some tokens: what `project` multiplies hidden states with."""
        return quantised_matmul.take_rows(self.head_weight, ids, self.config.hidden_size).astype(self.dtype)

    @property
    def head_weight(self) -> Weight:
        """The head's matrix, which is the embedding table in many models."""
        return (self.embedding if self.head is None else self.head.weight).get_value()

    def capped(self, scores: Float[Array, "... vocab"]) -> Float[Array, "... vocab"]:
        """Scores of the head with the softcap of the family, if it has one."""
        cap = self.config.final_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)


def empty_pools(
    config: ModelConfig, *, num_pages: int, page_size: int, dtype: DTypeLike, num_ring_pages: int | None = None
) -> tuple[KvPool, ...]:
    """Zeroed K and V pools of the layers that have their own (the first ones); page 0 is the one that nobody reads.

    Layers with a window have `num_ring_pages` pages where a number is given, else as many as the others.
    """

    def zeros(layer: LayerConfig, width: int) -> Array:
        pages = num_pages if layer.window is None or num_ring_pages is None else num_ring_pages
        return jnp.zeros((pages * page_size, layer.num_kv_heads, width), dtype)

    return tuple((zeros(layer, config.key_width(layer)), zeros(layer, layer.head_dim)) for layer in config.own_layers)
