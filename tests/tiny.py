"""Tiny random networks, and drafters that are right or wrong on purpose, for tests of everything above the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from checkpoints.random_models import random_drafter, random_target
from dflash_jax.engine.loading import Model
from dflash_jax.engine.profile import Profile
from dflash_jax.engine.template import ChatTemplate
from dflash_jax.engine.tokenizer import Tokenizer
from dflash_jax.models.config import DrafterConfig, LayerConfig, ModelConfig, RopeConfig
from dflash_jax.models.decoder import Decoder, Place
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.layers import KvPool

F32 = jnp.dtype(jnp.float32)
PAGE_SIZE = 16
VOCABULARY = 300
LONGEST_SCRIPT = 576

TARGET = ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_heads=4,
    layers=(LayerConfig(head_dim=16, num_kv_heads=2, mlp_width=80, attention_scale=0.25, rope=RopeConfig(theta=1e4)),)
    * 4,
    norm_eps=1e-5,
    context_length=256,
    tied_embeddings=True,
)
DRAFTER = DrafterConfig(
    hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
    block_size=16,
    mask_id=7,
    target_layers=(1, 2),
    windows=(None, 24),
    causal=(False, True),
    num_target_layers=4,
    vocab_size=VOCABULARY,
)


def tiny_target(seed: int = 0, config: ModelConfig = TARGET) -> Decoder:
    """A random target; its weights are large enough that its greedy answers do not settle into one token."""
    return Decoder(config, random_target(config, seed), dtype=F32)


def tiny_drafter(seed: int = 1, config: DrafterConfig = DRAFTER) -> Drafter:
    """A drafter that knows nothing."""
    return Drafter(config, random_drafter(config, seed), dtype=F32)


def padded(script: Sequence[int]) -> np.ndarray:
    """A script with zeros behind it, so that one program serves scripts of any length."""
    return np.pad(np.asarray(script, np.int32), (0, LONGEST_SCRIPT - len(script)))


class ScriptedDrafter(nnx.Module):
    """Proposes token `script[p]` for position p, whatever it is shown.

    An oracle if the script is what the target will say.
    """

    def __init__(self, target: Decoder, script: Sequence[int], config: DrafterConfig = DRAFTER) -> None:
        self.config = config
        self.script = nnx.Param(jnp.asarray(padded(script)))
        self.embedding = nnx.Param(target.embedding.get_value())

    def read(self, features: jnp.ndarray, pools: Sequence[KvPool], place: Place) -> tuple[KvPool, ...]:
        """Learns nothing."""
        return tuple(pools)

    def __call__(
        self, embeddings: jnp.ndarray, pools: Sequence[KvPool], place: Place
    ) -> tuple[jnp.ndarray, tuple[KvPool, ...]]:
        """Hidden states whose largest logits are those of the script's tokens.

        Rows of a random table are nearly orthogonal; they are lengthened until noise cannot choose another token.
        """
        tokens = jnp.take(self.script.get_value(), place.positions, mode="clip")
        rows = jnp.take(self.embedding.get_value(), tokens, axis=0)
        return 40 * rows / jnp.sum(rows * rows, axis=-1, keepdims=True), tuple(pools)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """One token per byte, and the two special tokens of ChatML."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend.to_str())


TINY_PROFILE = Profile(
    dtype=F32,
    page_size=PAGE_SIZE,
    chunks=(8, 32),
    plain_rows=1,
    block_rows=(4, 16),
    max_steps=4,
    visit_seconds=0.02,
    max_sessions=2,
)


def tiny_model(drafter: Drafter | ScriptedDrafter | None = None, *, context_length: int = 512) -> Model:
    """A random target with a tokenizer and a chat template, ready for an engine."""
    config = dataclasses.replace(TARGET, context_length=context_length, stop_ids=(257,))
    return Model(
        target=tiny_target(config=config),
        profile=TINY_PROFILE,
        tokenizer=tiny_tokenizer(),
        template=ChatTemplate(TEMPLATE),
        drafter=drafter,  # type: ignore[arg-type]
    )
