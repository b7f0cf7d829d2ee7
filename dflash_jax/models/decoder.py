"""One decoder for every target family: embedding, layers, head. What differs between families is data in `ModelConfig`.

All passes (prefill chunk, decode step, verify, scoring) are one function, `Decoder.__call__`: rows of one or more slots
enter at given token indices, their K and V are written to the pools, and they attend to what the pools hold up to
themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import LayerConfig, ModelConfig
from dflash_jax.models.layers import (
    GatedMlp,
    KvPool,
    Linear,
    RMSNorm,
    Weight,
    below,
    dense,
    rope_tables,
    rotate,
    write_rows,
)
from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.quantised_matmul import api as quantised_matmul


@dataclasses.dataclass(frozen=True)
class Place:
    """Where rows stand: their slots' page tables, the token index of each slot's first row, RoPE positions of all rows.

    Token index (where K and V are stored, what masks compare) and position (what RoPE sees) differ in a pruned prompt.
    """

    page_table: Int[Array, "slots pages"]
    starts: Int[Array, " slots"]
    positions: Int[Array, "slots rows"]
    page_size: int


QueriesKeys = tuple[Float[Array, "slots rows heads head_dim"], Float[Array, "slots rows kv_heads head_dim"]]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a pass through the decoder leaves behind.

    `hidden` is the residual stream after the last layer that ran, before the final norm. `features` are the residual
    streams after the captured layers, concatenated. `unrotated` has queries and keys before RoPE of the layers
    asked for, in that order.
    """

    hidden: Float[Array, "slots rows dim"]
    pools: tuple[KvPool, ...]
    features: Float[Array, "slots rows features"] | None
    unrotated: tuple[QueriesKeys, ...]


class Attention(nnx.Module):
    """Grouped-query attention over the pool, with the family's norms on q, k and v."""

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig, layer: LayerConfig) -> None:
        names = ("q", "k", "v")
        bias = jnp.concatenate([dense(parameters[f"{name}_bias"]) for name in names]) if config.attention_bias else None
        self.qkv = Linear(quantised_matmul.concatenate([parameters[name] for name in names]), bias)
        self.out = Linear(parameters["o"])
        norm = {"eps": config.norm_eps, "offset": config.norm_offset}
        self.q_norm = RMSNorm(dense(parameters["q_norm"]), **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(dense(parameters["k_norm"]), **norm) if config.qk_norm else None
        self.v_norm = RMSNorm(None, eps=config.norm_eps) if config.v_norm else None
        self.num_heads = config.num_heads
        self.layer = layer

    def project(
        self, x: Float[Array, "slots rows dim"]
    ) -> tuple[
        Float[Array, "slots rows heads head_dim"],
        Float[Array, "slots rows kv_heads head_dim"],
        Float[Array, "slots rows kv_heads head_dim"],
    ]:
        """Queries, keys and values with their norms, before RoPE."""
        layer = self.layer
        slots, rows, _ = x.shape
        heads = self.qkv(x).reshape(slots, rows, self.num_heads + 2 * layer.num_kv_heads, layer.head_dim)
        q, k, v = jnp.split(heads, [self.num_heads, self.num_heads + layer.num_kv_heads], axis=2)
        return (
            q if self.q_norm is None else self.q_norm(q),
            k if self.k_norm is None else self.k_norm(k),
            v if self.v_norm is None else self.v_norm(v),
        )

    def __call__(
        self, x: Float[Array, "slots rows dim"], rope: tuple[Array, Array], pool: KvPool, place: Place
    ) -> tuple[Float[Array, "slots rows dim"], KvPool, QueriesKeys]:
        q, k, v = self.project(x)
        pool = write_rows(pool, rotate(k, rope), v, place.page_table, place.starts, place.page_size)
        mixed = block_attention(
            rotate(q, rope),
            *pool,
            place.page_table,
            place.starts,
            page_size=place.page_size,
            scale=self.layer.attention_scale,
            window=self.layer.window,
        )
        return self.out(mixed.reshape(*x.shape[:2], -1)), pool, (q, k)


class DecoderLayer(nnx.Module):
    """Attention and gated MLP with pre-norms, and post-norms where the family has them."""

    def __init__(self, parameters: Mapping[str, Weight], config: ModelConfig, layer: LayerConfig) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(dense(parameters[name]), eps=config.norm_eps, offset=config.norm_offset)

        self.attention_norm = norm("attention_norm")
        self.attention = Attention(below(parameters, "attention."), config, layer)
        self.attention_post_norm = norm("attention_post_norm") if config.sandwich_norms else None
        self.mlp_norm = norm("mlp_norm")
        self.mlp = GatedMlp(
            parameters["mlp.gate"], parameters["mlp.up"], parameters["mlp.down"], activation=config.activation
        )
        self.mlp_post_norm = norm("mlp_post_norm") if config.sandwich_norms else None

    def __call__(
        self, x: Float[Array, "slots rows dim"], rope: tuple[Array, Array], pool: KvPool, place: Place
    ) -> tuple[Float[Array, "slots rows dim"], KvPool, QueriesKeys]:
        mixed, pool, unrotated = self.attention(self.attention_norm(x), rope, pool, place)
        x = x + (mixed if self.attention_post_norm is None else self.attention_post_norm(mixed))
        wide = self.mlp(self.mlp_norm(x))
        return x + (wide if self.mlp_post_norm is None else self.mlp_post_norm(wide)), pool, unrotated


class Decoder(nnx.Module):
    """A target or scorer. `parameters` go by the names of `models.parameters.target_parameters`."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Weight], *, dtype: DTypeLike) -> None:
        self.config = config
        self.dtype = dtype
        self.embedding = nnx.Param(parameters["embed"])
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
        rows = quantised_matmul.take_rows(self.embedding.get_value(), tokens).astype(self.dtype)
        return rows * jnp.asarray(self.config.embedding_scale, self.dtype)

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
        x = self.embed(tokens)
        tables = {}
        new_pools, features, taken = list(pools), {}, {}
        for index, layer in enumerate(self.config.layers[:num_layers]):
            key = (layer.rope, layer.head_dim)
            if key not in tables:
                tables[key] = rope_tables(*key, place.positions)
            x, new_pools[index], taken[index] = self.layers[index](x, tables[key], pools[index], place)
            if index in capture:
                features[index] = x
        if num_layers is not None and num_layers in unrotated:
            layer = self.layers[num_layers]
            taken[num_layers] = layer.attention.project(layer.attention_norm(x))[:2]
        joined = jnp.concatenate([features[index] for index in capture], axis=-1) if capture else None
        return Pass(x, tuple(new_pools), joined, tuple(taken[index] for index in unrotated))

    def logits(self, hidden: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Final norm, head, softcap; f32. `hidden` is the residual stream after the last layer."""
        return self.project(self.final_norm(hidden))

    def project(self, normed: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
        """Head and softcap alone, for hidden states that carry their own final norm (the drafter's)."""
        if self.head is None:
            scores = quantised_matmul.matmul(normed, self.embedding.get_value()).astype(jnp.float32)
        else:
            scores = self.head(normed).astype(jnp.float32)
        cap = self.config.final_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)


def empty_pools(config: ModelConfig, *, num_pages: int, page_size: int, dtype: DTypeLike) -> tuple[KvPool, ...]:
    """Zeroed K and V pools for every layer; page 0 is the one that nobody reads."""
    return tuple(
        (
            jnp.zeros((num_pages * page_size, layer.num_kv_heads, layer.head_dim), dtype),
            jnp.zeros((num_pages * page_size, layer.num_kv_heads, layer.head_dim), dtype),
        )
        for layer in config.layers
    )
