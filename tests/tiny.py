"""Tiny random networks, and drafters that are right or wrong on purpose, for tests of everything above the models."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.random_models import random_drafter, random_target
from dflash_jax.models.config import DrafterConfig, LayerConfig, ModelConfig, RopeConfig
from dflash_jax.models.decoder import Decoder, Place
from dflash_jax.models.drafter import Drafter
from dflash_jax.models.layers import KvPool

F32 = jnp.dtype(jnp.float32)
PAGE_SIZE = 16
VOCABULARY = 300

TARGET = ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_heads=4,
    layers=(LayerConfig(head_dim=16, num_kv_heads=2, mlp_width=80, attention_scale=0.25, rope=RopeConfig(theta=1e4)),) * 4,
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


class ScriptedDrafter(nnx.Module):
    """Proposes token `script[p]` for position p, whatever it is shown: an oracle if the script is what the target will say."""

    def __init__(self, target: Decoder, script: Sequence[int], config: DrafterConfig = DRAFTER) -> None:
        self.config = config
        self.script = nnx.Param(jnp.asarray(np.pad(np.asarray(script, np.int32), (0, 64))))
        self.embedding = nnx.Param(target.embedding.get_value())

    def read(self, features: jnp.ndarray, pools: Sequence[KvPool], place: Place) -> tuple[KvPool, ...]:
        """Learns nothing."""
        return tuple(pools)

    def __call__(
        self, embeddings: jnp.ndarray, pools: Sequence[KvPool], place: Place
    ) -> tuple[jnp.ndarray, tuple[KvPool, ...]]:
        """Hidden states whose largest logits are those of the script's tokens (rows of a random table are nearly orthogonal)."""
        tokens = jnp.take(self.script.get_value(), place.positions, mode="clip")
        return jnp.take(self.embedding.get_value(), tokens, axis=0), tuple(pools)
