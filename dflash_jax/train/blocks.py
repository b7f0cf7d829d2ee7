"""Many blocks of one sequence at once, as training needs them.

Decoding drafts one block after the last token; training drafts blocks after random tokens (*anchors*) of a sequence
whose features are all known. Everything but attention is the drafter's own code, with a block as a slot; attention
reads the sequence's context, which all its blocks share, and each block's own rows, without pools.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dflash_jax.models.drafter import Drafter
from dflash_jax.models.layers import rope_tables


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks drawn from a batch: slot 0 of a block is its anchor, slot k what comes k tokens later.

    anchors  token index of each block's anchor in its row
    tokens   what the row really has in each slot
    counts   whether a slot's token belongs to the answer that the anchor is in front of or inside
    """

    anchors: Int[Array, "rows blocks"]
    tokens: Int[Array, "rows blocks block"]
    counts: Bool[Array, "rows blocks block"]


def draw_blocks(
    tokens: Int[Array, "rows length"],
    answers: Bool[Array, "rows length"],
    key: PRNGKeyArray,
    *,
    blocks: int,
    block_size: int,
) -> Blocks:
    """`blocks` random anchors of each row, no token twice; a row with fewer answer tokens fills up with dead ones.

    An anchor is a token in front of an answer's token: the last of the prompt, or one of the answer itself.
    """
    length = tokens.shape[1]
    before_answer = jnp.pad(answers[:, 1:], ((0, 0), (0, 1)))
    possible = before_answer & (jnp.arange(length) > 0)[None, :]
    lot = jnp.where(possible, jax.random.uniform(key, tokens.shape), -1.0)
    chance, anchors = jax.lax.top_k(lot, blocks)
    at = anchors[:, :, None] + jnp.arange(block_size)[None, None, :]
    inside = at < length
    at = jnp.minimum(at, length - 1).reshape(len(tokens), -1)
    shape = (len(tokens), blocks, block_size)
    slots = jnp.take_along_axis(tokens, at, axis=1).reshape(shape)
    is_answer = jnp.take_along_axis(answers, at, axis=1).reshape(shape) & inside & (chance > 0)[:, :, None]
    counts = jnp.cumprod(is_answer[:, :, 1:].astype(jnp.int32), axis=-1) > 0
    return Blocks(anchors.astype(jnp.int32), slots, jnp.pad(counts, ((0, 0), (0, 0), (1, 0))))


def in_front_of_slots(values: Float[Array, "rows length dim"], blocks: Blocks) -> Float[Array, "rows blocks slots dim"]:
    """What the sample has at the token before each slot after the anchor: from there the target predicts the slot."""
    rows, count, size = blocks.tokens.shape
    at = blocks.anchors[:, :, None] + jnp.arange(size - 1, dtype=jnp.int32)[None, None, :]
    at = jnp.minimum(at, values.shape[1] - 1).reshape(rows, -1, 1)
    return jnp.take_along_axis(values, at, axis=1).reshape(rows, count, size - 1, -1)


def draft_blocks(
    drafter: Drafter,
    features: Float[Array, "rows length features"],
    embeddings: Float[Array, "rows blocks block dim"],
    anchors: Int[Array, "rows blocks"],
) -> Float[Array, "rows blocks block dim"]:
    """Hidden states of all blocks, after the drafter's final norm: what decoding gives for each block by itself."""
    config = drafter.config
    rows, blocks, size, _ = embeddings.shape
    length = features.shape[1]
    context = drafter.context(features)
    places = jnp.tile(jnp.arange(length, dtype=jnp.int32)[None], (rows, 1))
    context_rope = rope_tables(config.rope, config.head_dim, places)
    positions = anchors.reshape(-1, 1) + jnp.arange(size, dtype=jnp.int32)[None, :]
    rope = rope_tables(config.rope, config.head_dim, positions)
    x = embeddings.reshape(rows * blocks, size, -1)
    for layer, window, causal in zip(drafter.layers, config.windows, config.causal, strict=True):
        read, taps = layer.attention_convolution(layer.attention_norm(x))
        mixed = _attend(
            layer.queries(read, rope),
            layer.keys_values(context, context_rope),
            layer.keys_values(read, rope),
            anchors,
            scale=config.head_dim**-0.5,
            window=window,
            causal=causal,
        )
        x = layer.finish(x, mixed, taps)
    return drafter.final_norm(x).reshape(embeddings.shape)


def _attend(
    queries: Float[Array, "rows_blocks block heads head_dim"],
    context: tuple[Array, Array],
    own: tuple[Array, Array],
    anchors: Int[Array, "rows blocks"],
    *,
    scale: float,
    window: int | None,
    causal: bool,
) -> Float[Array, "rows_blocks block heads head_dim"]:
    """Slot t of the block at anchor a sees context tokens before a, and its block's slots."""
    (_, size, _, head_dim), (rows, blocks) = queries.shape, anchors.shape
    kv_heads, length = context[0].shape[2], context[0].shape[1]
    grouped = (queries * jnp.asarray(scale, queries.dtype)).reshape(rows, blocks, size, kv_heads, -1, head_dim)
    keys, values = (part.reshape(rows, blocks, size, kv_heads, head_dim) for part in own)
    far = jnp.einsum("rntkgd,rskd->rkgnts", grouped, context[0], preferred_element_type=jnp.float32)
    near = jnp.einsum("rntkgd,rnskd->rkgnts", grouped, keys, preferred_element_type=jnp.float32)
    token = jnp.arange(length)[None, None, None, :]
    query_token = anchors[:, :, None, None] + jnp.arange(size)[None, None, :, None]  # [rows, blocks, slots, 1]
    seen = token < anchors[:, :, None, None]
    seen = seen if window is None else seen & (query_token - token < window)
    step = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
    near_seen = (step >= 0) if causal else jnp.ones_like(step, jnp.bool_)
    near_seen = near_seen if window is None else near_seen & (step < window)
    far = jnp.where(seen[:, None, None], far, -jnp.inf)
    near = jnp.where(near_seen[None, None, None, None], near, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([far, near], axis=-1), axis=-1).astype(queries.dtype)
    mixed = jnp.einsum("rkgnts,rskd->rntkgd", weights[..., :length], context[1])
    mixed = mixed + jnp.einsum("rkgnts,rnskd->rntkgd", weights[..., length:], values)
    return mixed.reshape(queries.shape)
