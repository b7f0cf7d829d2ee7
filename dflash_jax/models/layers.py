"""What target and drafter share: linear maps in any weights format, RMSNorm, RoPE, gated MLP, KV pool writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dflash_jax.models.config import RopeConfig
from pallas_kernels.quantised_matmul import api as quantised_matmul

Weight = quantised_matmul.Weight
KvPool = tuple[Float[Array, "_tokens _kv_heads _head_dim"], Float[Array, "_tokens _kv_heads _head_dim"]]
"""K and V of one layer: `pages * page_size` rows each, shared by all sequences through page tables.

Layers differ in pages and heads, and K may be narrower than V (the underscores tell jaxtyping so).
"""


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
        product = quantised_matmul.matmul(x, self.weight.get_value())
        if self.bias is None:
            return product
        return product + jnp.expand_dims(self.bias.get_value().astype(x.dtype), range(product.ndim - 1))


def _mean_square(x: Float[Array, "... dim"]) -> Float[Array, "... 1"]:
    """Row means whose bits do not depend on the number of rows: XLA sums fewer than 8 rows in another order (CPU)."""
    rows = x.reshape(-1, x.shape[-1])
    padded = jnp.pad(rows, ((0, max(0, 8 - len(rows))), (0, 0)))
    return jnp.mean(jnp.square(padded), axis=-1)[: len(rows)].reshape(*x.shape[:-1], 1)


class RMSNorm(nnx.Module):
    """`x / rms(x) * (weight + offset)`, computed in f32 over the last axis; without a weight it only normalises."""

    def __init__(self, weight: Float[Array, " dim"] | None, *, eps: float, offset: float = 0.0) -> None:
        self.scale = None if weight is None else nnx.Param(weight.astype(jnp.float32) + offset)
        self.eps = eps

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(_mean_square(wide) + self.eps)
        if self.scale is not None:
            normed = normed * jnp.expand_dims(self.scale.get_value(), range(x.ndim - 1))
        return normed.astype(x.dtype)


class GatedMlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))` with gate and up as one matrix, so that x is read once."""

    def __init__(self, gate: Weight, up: Weight, down: Weight, *, activation: str) -> None:
        self.gate_up = Linear(quantised_matmul.concatenate([gate, up]))
        self.down = Linear(down)
        self.activation = activation

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "slots rows"]
) -> tuple[Float[Array, "slots rows 1 half"], Float[Array, "slots rows 1 half"]]:
    """cos and sin of the angle of every pair at every position, f32, ready to broadcast over heads."""
    steps = jnp.asarray(rope.inverse_frequencies(head_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * steps[None, None, :]  # [slots, rows, half]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(
    x: Float[Array, "slots rows heads head_dim"],
    tables: tuple[Float[Array, "slots rows 1 half"], Float[Array, "slots rows 1 half"]],
) -> Float[Array, "slots rows heads head_dim"]:
    """Half-split RoPE: pair (d, d + head_dim / 2) turns by its angle."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def turning(x: Float[Array, "... head_dim"], width: int) -> Float[Array, "... width"]:
    """The dims of each head that RoPE turns, where it turns the first `width / 2` pairs only."""
    half = x.shape[-1] // 2
    return jnp.concatenate([x[..., : width // 2], x[..., half : half + width // 2]], axis=-1)


def standing(width: int, head_dim: int) -> Bool[np.ndarray, " head_dim"]:
    """Which dims of a head are not among those."""
    return np.arange(head_dim) % (head_dim // 2) >= width // 2


def write_rows(
    pool: KvPool,
    keys: Float[Array, "slots rows kv_heads key_width"],
    values: Float[Array, "slots rows kv_heads head_dim"],
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    page_size: int,
    *,
    ring: bool = False,
) -> KvPool:
    """Puts the rows at token indices `starts..` of each slot.

    Rows past a slot's last page land in page 0, which nobody reads; a ring of pages goes round instead.
    """
    slots, rows = keys.shape[:2]
    index = starts[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]  # [slots, rows]
    page_number = index // page_size
    if ring:
        page_number = page_number % page_table.shape[1]
    inside = page_number < page_table.shape[1]
    page = jnp.take_along_axis(page_table, jnp.where(inside, page_number, 0), axis=1)
    target = jnp.where(inside, page * page_size + index % page_size, index % page_size).reshape(slots * rows)

    # XLA turns a scatter of one row into an update that copies the whole pool (CPU, jax 0.10); the same row twice stays
    # in place.
    twice = 2 if slots * rows == 1 else 1
    target = jnp.tile(target, twice)

    def put(old: Array, new: Array) -> Array:
        flat = jnp.tile(new.reshape(slots * rows, *new.shape[2:]).astype(old.dtype), (twice, 1, 1))
        return old.at[target].set(flat, mode="promise_in_bounds")

    return put(pool[0], keys), put(pool[1], values)
