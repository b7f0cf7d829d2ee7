"""The learning step: the target reads, the drafter drafts after random anchors, an optimiser corrects it.

All devices take part: each has some rows of a batch, gradients are added up, everything else is the same on all.
Parameters are f32 and go by their canonical names; the drafter is built from them, in the compute dtype, inside the
step. The target is never changed: its embedding and head serve the drafter as they serve decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from checkpoints.random_models import random_drafter
from dflash_jax.models.config import DrafterConfig
from dflash_jax.models.decoder import Decoder
from dflash_jax.models.drafter import Drafter, block_tokens
from dflash_jax.models.parameters import drafter_parameters
from dflash_jax.models.whole import read_whole
from dflash_jax.train.blocks import Blocks, draft_blocks, draw_blocks, in_front_of_slots
from dflash_jax.train.loss import Logits, Score, score_blocks
from dflash_jax.train.recipe import Recipe
from dflash_jax.train.samples import Batch
from pallas_kernels.quantised_matmul import api as quantised_matmul

Parameters = dict[str, Array]
_CHUNK_SLOTS = 2048
"""Slots whose logits exist at the same time."""
_ADAM_SHARE = 0.3
"""AdamW's rate for norms and taps, where Muon has the matrices, as a share of Muon's."""
_GRADIENT_NORM = 1.0
DATA = "data"
"""The axis of devices along which rows are spread."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step was worth: the loss, and mean committed tokens of blocks without and with the path selector."""

    loss: Float[Array, ""]
    accept_length: Float[Array, ""]
    path_accept_length: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step, and what is stored to continue it."""

    parameters: Parameters
    optimiser: Any
    step: Int[Array, ""]


class Learner:
    """Compiled steps for one target and one recipe."""

    def __init__(self, target: Decoder, config: DrafterConfig, recipe: Recipe) -> None:
        self.config, self.recipe = config, recipe
        self._graph, self._weights = nnx.split(target)
        scale = target.final_norm.scale
        self._norm_scale = jnp.ones(config.hidden_size) if scale is None else scale.get_value()  # what the head expects
        self._dtype = target.dtype
        self._optimiser = _optimiser(recipe, config)
        self._mesh = data_mesh()
        self._weights = self._everywhere(self._weights)
        everywhere, rows = PartitionSpec(), PartitionSpec(DATA)
        shared = {"mesh": self._mesh, "out_specs": (everywhere, everywhere), "check_vma": False}
        places = (everywhere, everywhere, rows, rows, everywhere)
        self._step = jax.jit(jax.shard_map(self._learn, in_specs=(*places, everywhere), **shared), donate_argnums=(1,))
        self._score = jax.jit(jax.shard_map(self._evaluate, in_specs=places, **shared))

    def start(self, seed: int = 0, parameters: Mapping[str, Any] | None = None) -> State:
        """The state before the first step, from random parameters or from given ones."""
        values = parameters
        if values is None:
            values = {**initial_parameters(self.config, seed), "final_norm": self._norm_scale}
        mine = {name: jnp.array(value, jnp.float32) for name, value in values.items()}
        return self._everywhere(State(mine, self._optimiser.init(mine), jnp.int32(0)))

    @property
    def devices(self) -> int:
        """How many devices share a batch: its rows must be a multiple of them."""
        return self._mesh.size

    def _everywhere(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def learn(self, state: State, batch: Batch, key: PRNGKeyArray, rate: float) -> tuple[State, Progress]:
        """One step of the given learning rate. Donates the state."""
        return self._step(self._weights, state, batch.tokens, batch.answers, key, jnp.float32(rate))

    def evaluate(self, parameters: Parameters, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Array]:
        """Committed tokens and number of the blocks after random anchors of the batch, with the path selector."""
        return self._score(self._weights, parameters, batch.tokens, batch.answers, key)

    def _learn(
        self, weights: nnx.State, state: State, tokens: Array, answers: Array, key: PRNGKeyArray, rate: Array
    ) -> tuple[State, Progress]:
        draw, choose = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index(DATA)))
        target = nnx.merge(self._graph, weights)
        blocks, features, opinions = self._read(target, tokens, answers, draw)
        share = self.recipe.path_share if self.config.path_rank else 0.0
        chosen = jax.random.bernoulli(choose, share, (blocks.anchors.size,))

        def loss(parameters: Parameters) -> tuple[Array, Score]:
            score = self._draft(target, parameters, blocks, features, chosen, opinions)
            return score.loss, score

        (value, score), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters)
        value, norm, gradients = jax.lax.psum((value, score.norm, gradients), DATA)
        norm = jnp.maximum(norm, 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / norm, gradients)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            changes, optimiser = self._optimiser.update(gradients, state.optimiser, state.parameters)
        parameters = jax.tree.map(lambda old, change: old + rate * change, state.parameters, changes)
        progress = Progress(value / norm, _mean(score, ~chosen), _mean(score, chosen))
        return State(parameters, optimiser, state.step + 1), progress

    def _evaluate(
        self, weights: nnx.State, parameters: Parameters, tokens: Array, answers: Array, key: PRNGKeyArray
    ) -> tuple[Array, Array]:
        target = nnx.merge(self._graph, weights)
        blocks, features, _ = self._read(target, tokens, answers, jax.random.fold_in(key, jax.lax.axis_index(DATA)))
        chosen = jnp.full(blocks.anchors.size, bool(self.config.path_rank))
        score = self._draft(target, parameters, blocks, features, chosen)
        return jax.lax.psum((jnp.sum(score.committed), jnp.sum(score.live)), DATA)

    def _read(
        self, target: Decoder, tokens: Array, answers: Array, key: PRNGKeyArray
    ) -> tuple[Blocks, Array, Array | None]:
        """Blocks of a batch, the features of all its tokens and, to learn from, what the target's head sees there."""
        passed = read_whole(target, tokens, dtype=self._dtype, capture=self.config.target_layers)
        if passed.features is None:
            raise ValueError("the drafter reads no layer of the target")
        count = max(1, tokens.shape[1] // self.recipe.tokens_per_anchor)
        blocks = draw_blocks(tokens, answers, key, blocks=count, block_size=self.config.block_size)
        opinions = target.final_norm(passed.hidden) if self.recipe.labels == "target" else None
        return blocks, *jax.lax.stop_gradient((passed.features, opinions))

    def _draft(
        self,
        target: Decoder,
        parameters: Parameters,
        blocks: Blocks,
        features: Array,
        chosen: Array,
        opinions: Array | None = None,
    ) -> Score:
        drafter = Drafter(self.config, _in(self._dtype, self.config, parameters), dtype=self._dtype)
        rows, count, size = blocks.tokens.shape
        seen = block_tokens(blocks.tokens[:, :, 0].reshape(-1), self.config, size)
        embeddings = target.embed(seen).reshape(rows, count, size, -1)
        hidden = draft_blocks(drafter, features, embeddings, blocks.anchors)[:, :, 1:].reshape(
            rows * count, size - 1, -1
        )
        tokens = blocks.tokens.reshape(rows * count, size)
        if drafter.path is not None:
            corrected = drafter.path(hidden, target.embed(tokens[:, :-1]))
            hidden = jnp.where(chosen[:, None, None], corrected, hidden)
        if opinions is not None:
            opinions = in_front_of_slots(opinions, blocks).reshape(rows * count, size - 1, -1)
        return score_blocks(
            _head(target),
            hidden,
            tokens[:, 1:],
            blocks.counts.reshape(rows * count, size)[:, 1:],
            opinions,
            weighting=self.recipe.weighting,
            decay=self.recipe.decay,
            chunk=_divisor(rows * count, max(1, _CHUNK_SLOTS // size)),
        )


def data_mesh() -> Mesh:
    """All devices in a row."""
    return Mesh(np.asarray(jax.devices()), (DATA,))


def initial_parameters(config: DrafterConfig, seed: int) -> Parameters:
    """Random matrices, norms of one. What a layer or the path selector adds starts at nothing.

    A convolution starts as one that changes nothing, whatever the rest is: its parameters fit beside those of a drafter
    that learnt without.
    """
    table, parameters = drafter_parameters(config), {}
    for name, value in random_drafter(config, seed).items():
        if name.endswith("convolution.taps"):
            value = jnp.zeros_like(value).at[::2].set(1.0)  # each row takes itself and nothing of the left one
        elif not table[name].matrix:
            value = jnp.ones_like(value)
        elif name.endswith(("attention.o", "mlp.down", "path.out", "convolution.corrections")):
            value = jnp.zeros_like(value)
        parameters[name] = value
    return parameters


def _head(target: Decoder) -> Logits:
    """The target's head as a dense matrix: kernels for few rows and for quantised weights let no gradient through."""
    matrix = quantised_matmul.dequantise(target.head_weight, target.config.hidden_size).astype(target.dtype)

    def logits(hidden: Float[Array, "blocks slots dim"]) -> Float[Array, "blocks slots vocab"]:
        return target.capped(jnp.einsum("bsd,vd->bsv", hidden, matrix, preferred_element_type=jnp.float32))

    return logits


def _optimiser(recipe: Recipe, config: DrafterConfig) -> optax.GradientTransformation:
    """Changes for a learning rate of 1; the step multiplies them with the rate of the moment."""
    if recipe.optimiser == "muon":
        table, axes = drafter_parameters(config), optax.contrib.MuonDimensionNumbers()
        matrices: Any = {name: axes if parameter.matrix else None for name, parameter in table.items()}
        changes = optax.contrib.muon(
            1.0,
            adam_learning_rate=_ADAM_SHARE,
            consistent_rms=0.2,
            adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
        )
    elif recipe.optimiser == "adamw":
        changes = optax.adamw(1.0, b1=0.9, b2=0.95, weight_decay=0.0)
    else:
        raise ValueError(f"optimiser {recipe.optimiser!r}: use muon or adamw")
    return optax.chain(optax.clip_by_global_norm(_GRADIENT_NORM), changes)


def _in(dtype: Any, config: DrafterConfig, parameters: Parameters) -> Parameters:
    """Matrices in the compute dtype."""
    table = drafter_parameters(config)
    return {name: value.astype(dtype) if table[name].matrix else value for name, value in parameters.items()}


def _mean(score: Score, among: Array) -> Array:
    counted = score.live & among
    sums = (jnp.sum(jnp.where(counted, score.committed, 0)), jnp.sum(counted))
    committed, blocks = jax.lax.psum(sums, DATA)
    return committed / jnp.maximum(blocks, 1)


def _divisor(total: int, most: int) -> int:
    """The largest divisor of `total` that is not above `most`."""
    return next(size for size in range(min(most, total), 0, -1) if total % size == 0)
