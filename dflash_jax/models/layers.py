"""What target and drafter share: linear maps in any weights format, the residual stream, gated MLP, RoPE's tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dflash_jax.models.config import RopeConfig
from pallas_kernels.attention_rows.api import KvPool
from pallas_kernels.quantised_matmul import api as quantised_matmul
from pallas_kernels.residual_norm import api as residual_norm

__all__ = [
    "ACTIVATIONS",
    "GatedMlp",
    "KvPool",
    "Linear",
    "RMSNorm",
    "SparsePool",
    "Stream",
    "Weight",
    "below",
    "dense",
    "rope_tables",
]

Weight = quantised_matmul.Weight
Parts = Float[Array, "parts slots rows _dim"]
"""What adds up to the result of a linear map (`quantised_matmul.matmul_parts`)."""


class SparsePool(NamedTuple):
    """A layer's pool while prompts are read sparsely: with the mean key of each block of the sequences at hand."""

    keys: Float[Array, "_tokens _kv_heads _key_width"]
    values: Float[Array, "_tokens _kv_heads _head_dim"]
    means: Float[Array, "_slots _blocks _kv_heads _width"]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def below(parameters: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """The parameters whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def dense(weight: Weight) -> Array:
    """A norm or a bias: these are never quantised."""
    return jnp.asarray(weight)


class Linear(nnx.Module):
    """`x @ weight.T (+ bias)`; the weight is a dense `[out, in]` matrix or one of the quantised forms."""

    def __init__(self, weight: Weight, bias: Float[Array, " out"] | None = None) -> None:
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return self._with_bias(quantised_matmul.matmul(x, self.weight.get_value()))

    def parts(self, x: Float[Array, "slots rows _in"]) -> Parts:
        """The same, not added up yet."""
        parts = quantised_matmul.matmul_parts(x, self.weight.get_value())
        return parts if self.bias is None else self._with_bias(residual_norm.sum_of(parts, x.dtype))[None]

    def _with_bias(self, product: Float[Array, "... out"]) -> Float[Array, "... out"]:
        if self.bias is None:
            return product
        return product + jnp.expand_dims(self.bias.get_value().astype(product.dtype), range(product.ndim - 1))


class RMSNorm(nnx.Module):
    """`x / rms(x) * (weight + offset)`, computed in f32 over the last axis; without a weight it only normalises."""

    def __init__(self, weight: Float[Array, " dim"] | None, *, eps: float, offset: float = 0.0) -> None:
        self.scale = None if weight is None else nnx.Param(weight.astype(jnp.float32) + offset)
        self.eps = eps

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        return residual_norm.rms_norm(x, self.scale_value, eps=self.eps)

    @property
    def scale_value(self) -> Float[Array, " dim"] | None:
        """What normed numbers are multiplied with."""
        return None if self.scale is None else self.scale.get_value()


@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream of a pass: `value`, and an update that is still to be added.

    A norm reads the stream next, and adds the update on its way. The update is normed by `post_norm` first in families
    with sandwich norms, and the sum is multiplied with a layer's `factor`.
    """

    value: Float[Array, "slots rows dim"]
    update: Float[Array, "parts slots rows dim"] | None = None
    post_norm: RMSNorm | None = None
    factor: Float[Array, " 1"] | None = None

    def settled(self) -> Stream:
        """The stream with its update."""
        if self.update is None:
            assert self.factor is None, "a factor comes with an update"
            return self
        eps = self._eps or 0.0  # without a post-norm there is nothing to norm
        return Stream(
            residual_norm.add(self.update, self.value, post_scale=self._post_scale, factor=self.factor, eps=eps)
        )

    def normed(self, norm: RMSNorm) -> tuple[Stream, Float[Array, "slots rows dim"]]:
        """The stream with its update, and its norm."""
        if self.update is None or norm.scale_value is None or self._eps not in (None, norm.eps):
            settled = self.settled()
            return settled, norm(settled.value)
        rows = self.value.reshape(-1, self.value.shape[-1])
        parts = self.update.reshape(-1, *rows.shape)
        both = residual_norm.residual_norm(
            parts, rows, norm.scale_value, post_scale=self._post_scale, factor=self.factor, eps=norm.eps
        )
        value, normed = (each.reshape(self.value.shape) for each in both)
        return Stream(value), normed

    @property
    def _eps(self) -> float | None:
        return None if self.post_norm is None else self.post_norm.eps

    @property
    def _post_scale(self) -> Float[Array, " dim"] | None:
        return None if self.post_norm is None else self.post_norm.scale_value


class GatedMlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))` with gate and up as one matrix, so that x is read once."""

    def __init__(self, gate: Weight, up: Weight, down: Weight, *, activation: str) -> None:
        self.gate_up = Linear(quantised_matmul.concatenate([gate, up]))
        self.down = Linear(down)
        self.activation = activation

    def __call__(self, x: Float[Array, "slots rows dim"]) -> Float[Array, "slots rows dim"]:
        return self.down(self._gated(x))

    def parts(self, x: Float[Array, "slots rows dim"]) -> Parts:
        """The same, not added up yet."""
        return self.down.parts(self._gated(x))

    def _gated(self, x: Float[Array, "slots rows dim"]) -> Float[Array, "slots rows width"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return ACTIVATIONS[self.activation](gate) * up


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "slots rows"]
) -> tuple[Float[Array, "slots rows 1 half"], Float[Array, "slots rows 1 half"]]:
    """cos and sin of the angle of every pair at every position, f32, ready to broadcast over heads."""
    steps = jnp.asarray(rope.inverse_frequencies(head_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * steps[None, None, :]  # [slots, rows, half]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
