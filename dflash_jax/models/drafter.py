"""The DFlash drafter: proposes a block of tokens in one pass, reading the target's features.

Every row of a block attends to the *context* (K and V made from the target's features of committed tokens) and to the
block's own rows. Context K and V depend on one token's features only, so they are computed once and live in pools that
share the target's page tables. Source: DFlash (z-lab), model.py; equations in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import DrafterConfig
from dflash_jax.models.decoder import Place
from dflash_jax.models.layers import (
    GatedMlp,
    KvPool,
    Linear,
    Parts,
    RMSNorm,
    Stream,
    Weight,
    below,
    dense,
    rope_tables,
)
from pallas_kernels.attention_rows.api import HeadLayout, HeadNorms, Heads, attention_rows, rotate
from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.quantised_matmul import api as quantised_matmul
from pallas_kernels.residual_norm import api as residual_norm

Taps = Float[Array, "slots rows 2 dim"]
"""What a row takes of itself and of the row on its left, channel by channel."""


class TwoTapConvolution(nnx.Module):
    """Lets a row of a block see its left neighbour, in front of attention or the MLP and again behind it.

        y[t] = taps[t, 0] * x[t] + taps[t, 1] * x[t - 1]

    A block is a slot; its first row, the anchor, has nothing on its left. Taps are those of each channel, plus
    corrections for groups of channels that are made of what the sublayer would have read. Without parameters nothing
    changes. Source: DFlash 2 (z-lab), `GroupedDynamicCausalConv` of model.py.
    """

    def __init__(self, parameters: Mapping[str, Weight]) -> None:
        # in front: own, left; behind: own, left
        self.taps = nnx.Param(dense(parameters["taps"])) if parameters else None
        # Of 576 channels these are 144 outputs. Triton takes multiples of 32, so XLA multiplies: empty rows up to 160
        # would give proposals other last bits, and nobody has measured that it would be faster.
        self.corrections = Linear(parameters["corrections"]) if parameters else None

    def __call__(self, normed: Float[Array, "slots rows dim"]) -> tuple[Float[Array, "slots rows dim"], Taps | None]:
        """What the sublayer reads, and the taps for what it gives."""
        if self.taps is None or self.corrections is None:
            return normed, None
        slots, rows, dim = normed.shape
        corrections = self.corrections(normed).astype(jnp.float32).reshape(slots, rows, 4, -1)
        corrections = jnp.repeat(corrections, dim // corrections.shape[-1], axis=-1)  # [slots, rows, 4, dim]
        taps = self.taps.get_value()[None, None] + corrections
        return convolved(normed, taps[:, :, :2]), taps[:, :, 2:]


def convolved(x: Float[Array, "slots rows dim"], taps: Taps | None) -> Float[Array, "slots rows dim"]:
    """The sum of two taps, in the dtype of x; x itself without taps."""
    if taps is None:
        return x
    wide = x.astype(jnp.float32)
    left = jnp.pad(wide[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return (taps[:, :, 0] * wide + taps[:, :, 1] * left).astype(x.dtype)


def _convolved_parts(parts: Parts, taps: Taps | None, dtype: jnp.dtype) -> Parts:
    """The same of what a linear map leaves, added up where there are taps."""
    return parts if taps is None else convolved(residual_norm.sum_of(parts, dtype), taps)[None]


class DrafterLayer(nnx.Module):
    """A Qwen3 layer whose keys and values come from the features (context) and from the block."""

    def __init__(self, parameters: Mapping[str, Weight], config: DrafterConfig, index: int) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(dense(parameters[name]), eps=config.norm_eps)

        self.attention_norm = norm("attention_norm")
        self.attention_convolution = TwoTapConvolution(below(parameters, "attention_convolution."))
        self.q = Linear(parameters["attention.q"])
        self.kv = Linear(quantised_matmul.concatenate([parameters["attention.k"], parameters["attention.v"]]))
        self.out = Linear(parameters["attention.o"])
        self.q_norm, self.k_norm = norm("attention.q_norm"), norm("attention.k_norm")
        self.mlp_norm = norm("mlp_norm")
        self.mlp_convolution = TwoTapConvolution(below(parameters, "mlp_convolution."))
        self.mlp = GatedMlp(parameters["mlp.gate"], parameters["mlp.up"], parameters["mlp.down"], activation="silu")
        self.config = config
        self.index = index

    def keys_values(
        self, x: Float[Array, "slots rows dim"], rope: tuple[Array, Array]
    ) -> tuple[Float[Array, "slots rows kv_heads head_dim"], Float[Array, "slots rows kv_heads head_dim"]]:
        """K (normed and rotated) and V of features or of block rows."""
        k, v = jnp.split(self.kv(x).reshape(*x.shape[:2], -1, self.config.head_dim), 2, axis=2)
        return rotate(self.k_norm(k), rope), v

    def queries(
        self, normed: Float[Array, "slots rows dim"], rope: tuple[Array, Array]
    ) -> Float[Array, "slots rows heads head_dim"]:
        """Queries (normed and rotated) of block rows."""
        q = self.q(normed).reshape(*normed.shape[:2], self.config.num_heads, self.config.head_dim)
        return rotate(self.q_norm(q), rope)

    def finish(
        self, x: Float[Array, "slots rows dim"], mixed: Float[Array, "slots rows heads head_dim"], taps: Taps | None
    ) -> Float[Array, "slots rows dim"]:
        """The residual stream after the layer, given what attention has mixed and the taps behind it.

        Gradients pass, as training needs.
        """
        x = x + convolved(self.out(mixed.reshape(*x.shape[:2], -1)), taps)
        read, taps = self.mlp_convolution(self.mlp_norm(x))
        return x + convolved(self.mlp(read), taps)

    def store(self, x: Float[Array, "slots rows dim"], rope: tuple[Array, Array], pool: KvPool, place: Place) -> KvPool:
        """The pool with K and V of features or of block rows."""
        _, written = self._attention_rows(self.kv.parts(x), pool, rope, place, x.dtype)
        assert written is not None
        return written

    def __call__(self, stream: Stream, rope: tuple[Array, Array], pool: KvPool, place: Place) -> tuple[Stream, KvPool]:
        stream, normed = stream.normed(self.attention_norm)
        read, taps = self.attention_convolution(normed)
        pool = self.store(read, rope, pool, place)
        queries, _ = self._attention_rows(self.q.parts(read), None, rope, place, read.dtype)
        mixed = block_attention(
            queries,
            *pool,
            place.page_table,
            place.starts,
            page_size=place.page_size,
            scale=self.config.head_dim**-0.5,
            window=self.config.windows[self.index],
            causal=self.config.causal[self.index],
        )
        return self._finish(stream.value, mixed, taps), pool

    def _attention_rows(
        self, parts: Parts, pool: KvPool | None, rope: tuple[Array, Array], place: Place, dtype: DTypeLike
    ) -> tuple[Heads, KvPool | None]:
        """Queries (without a pool) or keys and values alone: they have matrices of their own."""
        config = self.config
        heads, kv_heads = (config.num_heads, 0) if pool is None else (0, config.num_kv_heads)
        norms = HeadNorms(self.q_norm.scale_value, self.k_norm.scale_value, False, config.norm_eps)
        return attention_rows(
            parts,
            pool,
            place.page_table,
            place.starts,
            rope,
            layout=HeadLayout(heads, kv_heads, config.head_dim, config.head_dim),
            norms=norms,
            dtype=dtype,
            page_size=place.page_size,
        )

    def _finish(
        self, x: Float[Array, "slots rows dim"], mixed: Float[Array, "slots rows heads head_dim"], taps: Taps | None
    ) -> Stream:
        parts = self.out.parts(mixed.reshape(*x.shape[:2], -1))
        stream, normed = Stream(x, _convolved_parts(parts, taps, x.dtype)).normed(self.mlp_norm)
        read, taps = self.mlp_convolution(normed)
        return Stream(stream.value, _convolved_parts(self.mlp.parts(read), taps, x.dtype))


class PathSelector(nnx.Module):
    """Corrects a row's hidden state for the token before it, which the parallel pass could not know.

    `hidden + out(previous(embedding) * mix(hidden))`: in logits this is DFlash 2's selector, a bilinear form of rank
    `path_rank` between the token before and the token proposed, with codebooks that are projections of the target's
    embedding and head.
    """

    def __init__(self, parameters: Mapping[str, Weight]) -> None:
        self.previous = Linear(parameters["previous"])
        self.mix = Linear(parameters["mix"])
        self.out = Linear(parameters["out"])

    def __call__(self, hidden: Float[Array, "... dim"], previous: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        return hidden + self.out(self.previous(previous) * self.mix(hidden))


class Drafter(nnx.Module):
    """The drafter network. `parameters` go by the names of `models.parameters.drafter_parameters`."""

    def __init__(self, config: DrafterConfig, parameters: Mapping[str, Weight], *, dtype: DTypeLike) -> None:
        self.config = config
        self.dtype = dtype
        self.feature_projection = Linear(parameters["feature_projection"])
        self.feature_norm = RMSNorm(dense(parameters["feature_norm"]), eps=config.norm_eps)
        self.layers = nnx.List(
            [DrafterLayer(below(parameters, f"layers.{index}."), config, index) for index in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(dense(parameters["final_norm"]), eps=config.norm_eps)
        self.path = PathSelector(below(parameters, "path.")) if config.path_rank else None

    def context(self, features: Float[Array, "slots rows features"]) -> Float[Array, "slots rows dim"]:
        """What all layers make the keys and values of committed tokens from."""
        return self.feature_norm(self.feature_projection(features))

    def read(
        self, features: Float[Array, "slots rows features"], pools: Sequence[KvPool], place: Place
    ) -> tuple[KvPool, ...]:
        """Stores the context K and V of rows whose features the target has just produced.

        Rows that turn out to be rejected need no undoing: the next block's rows overwrite them before anybody reads.
        """
        context = self.context(features)
        rope = rope_tables(self.config.rope, self.config.head_dim, place.positions)
        return tuple(layer.store(context, rope, pool, place) for layer, pool in zip(self.layers, pools, strict=True))

    def __call__(
        self, embeddings: Float[Array, "slots rows dim"], pools: Sequence[KvPool], place: Place
    ) -> tuple[Float[Array, "slots rows dim"], tuple[KvPool, ...]]:
        """Hidden states of a block, after the drafter's own final norm: ready for the target's head.

        `embeddings` are the target's, of the anchor and of mask tokens. The block's K and V are left in the pools at
        the rows that `read` will overwrite.
        """
        rope = rope_tables(self.config.rope, self.config.head_dim, place.positions)
        stream, new_pools = Stream(embeddings), []
        for layer, pool in zip(self.layers, pools, strict=True):
            stream, pool = layer(stream, rope, pool, place)
            new_pools.append(pool)
        return stream.normed(self.final_norm)[1], tuple(new_pools)


def block_tokens(anchor: Int[Array, " slots"], config: DrafterConfig, rows: int) -> Int[Array, "slots rows"]:
    """The drafter's input: the anchor, then mask tokens.

    Blocks shorter than those that the drafter was trained on are as good: their proposals are accepted as often.
    """
    masks = jnp.full((anchor.shape[0], rows - 1), config.mask_id, jnp.int32)
    return jnp.concatenate([anchor[:, None], masks], axis=1)


def empty_drafter_pools(
    config: DrafterConfig, *, num_pages: int, page_size: int, dtype: DTypeLike
) -> tuple[KvPool, ...]:
    """Zeroed K and V pools of the drafter's layers, paged like the target's."""
    shape = (num_pages * page_size, config.num_kv_heads, config.head_dim)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
