"""A target for Python programs: logits and features of whole sequences, without an engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import checkpoints
from dflash_jax.engine.profile import profile_for_device
from dflash_jax.models.config import ModelConfig
from dflash_jax.models.decoder import Decoder
from dflash_jax.models.whole import read_whole


class Target:
    """A decoder over whole sequences, without state between calls."""

    def __init__(self, decoder: Decoder) -> None:
        self.config = decoder.config
        self._graph, self._state = nnx.split(decoder)
        self._dtype = decoder.dtype

    def logits(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens vocab"]:
        """f32 logits after every token."""
        return _logits(self._graph, self._state, self._dtype, jnp.asarray(ids, jnp.int32))

    def features(self, ids: Int[Array, "batch tokens"], layers: Sequence[int]) -> Float[Array, "batch tokens features"]:
        """f32 residual streams after the given 0-based layers, concatenated: what a drafter reads."""
        wrong = [layer for layer in layers if not 0 <= layer < self.config.num_layers]
        if wrong or not layers:
            raise ValueError(f"layers {list(layers)}: this target has layers 0 to {self.config.num_layers - 1}")
        return _features(self._graph, self._state, self._dtype, jnp.asarray(ids, jnp.int32), tuple(layers))


def load_target(path: str | Path | None = None) -> Target:
    """The target at `path` (a converted folder, a Hugging Face folder or a GGUF), or the default model.

    Example: `dflash_jax.load_target("smollm2").logits(ids)` gives f32[batch, tokens, vocab].
    """
    loaded = checkpoints.load(checkpoints.default_model() if path is None else Path(path))
    if not isinstance(loaded.config, ModelConfig):
        raise checkpoints.CheckpointError(f"{path} holds a drafter, not a target")
    return Target(Decoder(loaded.config, loaded.parameters, dtype=profile_for_device().dtype))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _logits(graph: nnx.GraphDef[Decoder], state: nnx.State, dtype: jnp.dtype, ids: Array) -> Array:
    decoder = nnx.merge(graph, state)
    return decoder.logits(read_whole(decoder, ids, dtype=dtype).hidden)


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def _features(
    graph: nnx.GraphDef[Decoder], state: nnx.State, dtype: jnp.dtype, ids: Array, layers: tuple[int, ...]
) -> Array:
    features = read_whole(nnx.merge(graph, state), ids, dtype=dtype, capture=layers).features
    if features is None:
        raise ValueError("no layers were asked for")
    return features.astype(jnp.float32)
