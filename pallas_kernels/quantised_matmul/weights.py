"""The weights formats of a linear map `[N, K]` (N outputs, K inputs): dense, 8 bits per row, 4 bits per group.

W8: row n is `values[n] * scales[n]`.
W4: signed 4 bits with one scale per group of 32 or 128 inputs. Four nibbles share an int16: the word in row
`32 * b + i` of `packed` holds inputs `128 * b + i + (0, 32, 64, 96)`, lowest nibble first, so that one nibble plane of
32 words is a plain `[32, N]` tile and, with groups of 32, plane p of block b is exactly group `4 * b + p`. A nibble
stands for its value + 8. K is padded to whole blocks of 128 with zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Int8, Int16

BLOCK = 128
"""Inputs that share a block of 32 packed words."""
GROUP_SIZES = (32, 128)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class W8:
    """8-bit weights with one scale per output row."""

    values: Int8[Array, "N K"]
    scales: Float[Array, " N"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed", "scales"], meta_fields=["group_size"])
@dataclasses.dataclass(frozen=True)
class W4:
    """4-bit weights with one scale per group of inputs."""

    packed: Int16[Array, "K/4 N"]
    scales: BFloat16[Array, "K/group N"]
    group_size: int


Weight = Array | W8 | W4


def _namespace(weight: Any) -> Any:
    """numpy stays numpy, so that converting a big checkpoint needs no device memory."""
    return np if isinstance(weight, np.ndarray) else jnp


def quantise_w8(weight: Float[Array, "N K"]) -> W8:
    """Rounds every row to 127 steps on either side of zero. numpy in, numpy out; jax in, jax out."""
    xp = _namespace(weight)
    wide = weight.astype(xp.float32)
    scales = xp.max(xp.abs(wide), axis=1) / xp.float32(127)
    steps = xp.where(scales == 0, xp.float32(1), scales)
    values = xp.clip(xp.round(wide / steps[:, None]), -127, 127)
    return W8(values=values.astype(xp.int8), scales=scales)


def quantise_w4(weight: Float[Array, "N K"], group_size: int = 32) -> W4:
    """Rounds groups of inputs to 16 steps; the entry of largest magnitude becomes -8, as in GGUF's Q4_0.

    numpy in, numpy out; jax in, jax out. Raises ValueError for another group size than 32 and 128.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; w4 has groups of 32 or 128 inputs: choose one of them")
    xp = _namespace(weight)
    rows, columns = weight.shape
    padded = -(-columns // BLOCK) * BLOCK
    wide = xp.pad(weight.astype(xp.float32), ((0, 0), (0, padded - columns)))
    groups = wide.reshape(rows, padded // group_size, group_size)
    largest = xp.take_along_axis(groups, xp.argmax(xp.abs(groups), axis=2)[:, :, None], axis=2)[:, :, 0]
    scales = (largest / xp.float32(-8)).astype(jnp.bfloat16)  # [N, groups]; the rounded scale is the one that is used
    steps = scales.astype(xp.float32)
    steps = xp.where(steps == 0, xp.float32(1), steps)
    values = xp.clip(xp.round(groups / steps[:, :, None]), -8, 7).astype(xp.int8).reshape(rows, padded)
    return W4(packed=pack_w4(values), scales=scales.T, group_size=group_size)


def pack_w4(values: Int8[Array, "N K"]) -> Int16[Array, "K/4 N"]:
    """Signed 4-bit values (-8 to 7) to words, K a multiple of 128; for sources that are 4-bit already."""
    xp = _namespace(values)
    rows, columns = values.shape
    if columns % BLOCK:
        raise ValueError(f"w4 packs whole blocks of {BLOCK} inputs, got {columns}: pad with zeros first")
    nibbles = (values + xp.int8(8)).astype(xp.uint16).T.reshape(columns // BLOCK, 4, BLOCK // 4, rows)
    words = nibbles[:, 0]
    for plane in range(1, 4):
        words = words | (nibbles[:, plane] << xp.uint16(4 * plane))
    return words.reshape(columns // 4, rows).view(xp.int16)


def unpack_w4(packed: Int16[Array, "K/4 N"]) -> Int8[Array, "N K"]:
    """The inverse of `pack_w4`."""
    xp = _namespace(packed)
    words, rows = packed.shape
    blocks = packed.view(xp.uint16).reshape(words * 4 // BLOCK, 1, BLOCK // 4, rows)
    shifts = xp.asarray([0, 4, 8, 12], xp.uint16).reshape(1, 4, 1, 1)
    nibbles = (xp.broadcast_to(blocks, (blocks.shape[0], 4, *blocks.shape[2:])) >> shifts) & xp.uint16(15)
    return (nibbles.reshape(words * 4, rows).astype(xp.int8) - xp.int8(8)).T


def dequantise(weight: Weight, in_features: int | None = None) -> Float[Array, "N K"]:
    """The f32 matrix that a weight stands for.

    A W4 has the columns that padded K, all zero, unless `in_features` cuts them.
    """
    if isinstance(weight, W8):
        return weight.values.astype(jnp.float32) * weight.scales[:, None]
    if isinstance(weight, W4):
        values = unpack_w4(weight.packed).astype(jnp.float32)  # [N, K]
        groups = values.reshape(values.shape[0], -1, weight.group_size)
        scaled = groups * weight.scales.astype(jnp.float32).T[:, :, None]
        return scaled.reshape(values.shape)[:, :in_features]
    return weight.astype(jnp.float32)


def take_rows(weight: Weight, ids: Int[Array, ...]) -> Float[Array, "... K"]:
    """Rows of an embedding table, f32. Ids outside the table are clipped into it."""
    if isinstance(weight, W4):
        flat = ids.reshape(-1)
        packed = jnp.take(weight.packed, flat, axis=1, mode="clip")
        scales = jnp.take(weight.scales, flat, axis=1, mode="clip")
        return dequantise(W4(packed, scales, weight.group_size)).reshape(*ids.shape, -1)
    if isinstance(weight, W8):
        values = jnp.take(weight.values, ids, axis=0, mode="clip").astype(jnp.float32)
        return values * jnp.take(weight.scales, ids, axis=0, mode="clip")[..., None]
    return jnp.take(weight, ids, axis=0, mode="clip").astype(jnp.float32)


def concatenate(weights: Sequence[Weight]) -> Weight:
    """One weight whose outputs are those of all weights in turn, so that x is read once. All of one format and K."""
    formats = {_format(weight) for weight in weights}
    if len(formats) != 1:
        raise ValueError(
            f"weights of one format can be concatenated, got {sorted(map(str, formats))}: convert them alike"
        )
    if eights := [weight for weight in weights if isinstance(weight, W8)]:
        return W8(
            values=jnp.concatenate([weight.values for weight in eights], axis=0),
            scales=jnp.concatenate([weight.scales for weight in eights], axis=0),
        )
    if fours := [weight for weight in weights if isinstance(weight, W4)]:
        return W4(
            packed=jnp.concatenate([weight.packed for weight in fours], axis=1),
            scales=jnp.concatenate([weight.scales for weight in fours], axis=1),
            group_size=fours[0].group_size,
        )
    return jnp.concatenate([weight for weight in weights if not isinstance(weight, W8 | W4)], axis=0)


def _format(weight: Weight) -> Any:
    if isinstance(weight, W4):
        return type(weight), weight.group_size
    return type(weight) if isinstance(weight, W8) else jnp.dtype(weight.dtype)
