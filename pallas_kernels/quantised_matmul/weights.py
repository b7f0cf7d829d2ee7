"""The weights formats of a linear map `[N, K]` (N outputs, K inputs): dense, 8 bits per row, 4 bits per group.

W8: row n is `values[n] * scales[n]`.
W4: signed 4 bits with one scale per group of 32 or 128 inputs. Four nibbles share an int16: the word in row
`32 * b + i` of `packed` holds inputs `128 * b + i + (0, 32, 64, 96)`, lowest nibble first, so that one nibble plane of
32 words is a plain `[32, N]` tile and, with groups of 32, plane p of block b is exactly group `4 * b + p`. A nibble
stands for its value + 8. K is padded to whole blocks of 128 with zeros. Scales are float16, as in GGUF's Q4_0: 11 bits
from 6.1e-5 to 65504, and multiples of 6e-8 below.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Int8, Int16

BLOCK = 128
"""Inputs that share a block of 32 packed words."""
GROUP_SIZES = (32, 128)
LARGEST_SCALE = 65504.0
"""The largest finite float16: weights of w4 reach 8 times as far."""
_SMALLEST_SCALE = 2.0**-24


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
    scales: Float16[Array, "K/group N"]
    group_size: int


Weight = Array | W8 | W4


def _namespace(weight: Any) -> Any:
    """numpy stays numpy, so that converting a big checkpoint needs no device memory."""
    return np if isinstance(weight, np.ndarray) else jnp


def _no_warnings() -> np.errstate:
    """numpy's own, of weights that are not finite: who reads the file tells of them. Each thread needs its own."""
    return np.errstate(invalid="ignore", over="ignore")


def quantise_w8(weight: Float[Array, "N K"]) -> W8:
    """Rounds every row to 127 steps on either side of zero. numpy in, numpy out; jax in, jax out."""
    xp = _namespace(weight)
    wide = weight.astype(xp.float32)
    with _no_warnings():
        scales = xp.max(xp.abs(wide), axis=1) / xp.float32(127)
        steps = xp.where(scales == 0, xp.float32(1), scales)
        values = xp.clip(xp.round(wide / steps[:, None]), -127, 127)
        return W8(values=values.astype(xp.int8), scales=scales)


def quantise_w4(weight: Float[Array, "N K"], group_size: int = 32) -> W4:
    """Rounds groups of inputs to 16 steps of the scale that leaves the smallest squared error.

    A group's scale is never worse than that of GGUF's Q4_0, which makes the entry of largest magnitude -8, and a group
    that is 16 steps of a float16 already comes back exactly. Weights beyond 8 * LARGEST_SCALE are cut there,
    and those below 2**-25 become 0. numpy in, numpy out; jax in, jax out.
    Raises ValueError for another group size than 32 and 128.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; w4 has groups of 32 or 128 inputs: choose one of them")
    quantise: Any = _quantise_w4_numpy if _namespace(weight) is np else _quantise_w4_jax
    packed, scales = quantise(weight, group_size)
    return W4(packed=packed, scales=scales, group_size=group_size)


_LARGEST_BECOMES = (-8.0, -7.0, -7.6, -7.3, -6.6, -8.4, -9.2)
"""How many steps the entry of largest magnitude may be, before rounding and clipping to -8..7.

Found on SmolLM2, where 20 candidates lower the squared error by less than one percent more.
"""
_PROBE = 4
"""Entries of a group that tell whether it may be whole steps of a scale; the others are looked at only then."""
_ROWS_BYTES = 1 << 19
"""f32 bytes of rows that are quantised together: what several temporaries of that size need fits a core's cache."""


def _quantise_w4_numpy(weight: np.ndarray, group_size: int) -> tuple[Any, Any]:
    rows, columns = weight.shape
    padded = -(-columns // BLOCK) * BLOCK
    packed = np.empty((padded // 4, rows), np.int16)
    scales = np.empty((padded // group_size, rows), np.float16)
    step = max(1, _ROWS_BYTES // (4 * max(padded, 1)))

    def quantise(start: int) -> None:
        part = slice(start, start + step)
        with _no_warnings():
            packed[:, part], scales[:, part] = _quantise_w4_rows(weight[part], group_size)

    # numpy lets go of the interpreter's lock inside its loops, so threads share the cores.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        collections.deque(pool.map(quantise, range(0, rows, step)), maxlen=0)
    return packed, scales


@functools.partial(jax.jit, static_argnums=1)
def _quantise_w4_jax(weight: Array, group_size: int) -> tuple[Array, Array]:
    rows, columns = weight.shape
    step = max(1, min(rows, (_ROWS_BYTES << 6) // (4 * max(columns, 1))))
    blocks = -(-rows // step)
    split = jnp.pad(weight, ((0, blocks * step - rows), (0, 0))).reshape(blocks, step, columns)
    packed, scales = jax.lax.map(lambda part: _quantise_w4_rows(part, group_size), split)  # [blocks, K/4, step]

    def join(parts: Array) -> Array:
        return parts.swapaxes(0, 1).reshape(parts.shape[1], -1)[:, :rows]

    return join(packed), join(scales)


def _quantise_w4_rows(weight: Any, group_size: int) -> tuple[Any, Any]:
    """Packed words and scales of some rows. Groups are columns here, so that sums over a group are sums of rows."""
    xp = _namespace(weight)
    rows, columns = weight.shape
    padded = -(-columns // BLOCK) * BLOCK
    wide = xp.pad(weight.astype(xp.float32), ((0, 0), (0, padded - columns)))
    groups = wide.reshape(-1, group_size).T  # [group_size, rows * groups of a row]
    reach = 8 * LARGEST_SCALE
    groups = np.clip(groups, -reach, reach, order="C") if xp is np else jnp.clip(groups, -reach, reach)
    low, high = xp.min(groups, axis=0), xp.max(groups, axis=0)
    largest = xp.where(high > -low, high, low)
    plain = largest / xp.float32(-8)
    best_gain, best_scale = xp.zeros_like(plain), plain
    for steps in _LARGEST_BECOMES:
        values = _round_w4(xp, groups, largest / xp.float32(steps))
        product, square = _dots(xp, groups, values), _dots(xp, values, values)
        fitted = product / xp.where(square == 0, xp.float32(1), square)  # least squares for these values
        gain = product * fitted  # squared error of all zeros less that of these values
        better = gain > best_gain
        best_gain, best_scale = xp.where(better, gain, best_gain), xp.where(better, fitted, best_scale)
    # The rounded scales are the ones that are used, so they decide. Both signs matter where the largest has a rival.
    scales = _as_float16(xp, plain)
    error = _error_w4(xp, groups, scales)
    for other in (-scales, _as_float16(xp, best_scale)):
        other_error = _error_w4(xp, groups, other)
        better = other_error < error
        error, scales = xp.where(better, other_error, error), xp.where(better, other, scales)
    scales = _whole_steps(xp, groups, largest, scales)
    values = _round_w4(xp, groups, scales).T.reshape(rows, padded)
    return pack_w4(values.astype(xp.int8)), scales.astype(xp.float16).reshape(rows, -1).T


def _whole_steps(xp: Any, groups: Any, largest: Any, scales: Any) -> Any:
    """`scales`, but the scale of which all entries are whole steps for groups that have one, as 4-bit sources do."""
    for count in range(1, 8):  # 8 is the plain scale, which came first
        tried = _as_float16(xp, largest / xp.float32(count))
        if xp is np:
            some = np.flatnonzero((_error_w4(np, groups[:_PROBE], tried) == 0) & (tried != 0))
            some = some[_error_w4(np, groups[:, some], tried[some]) == 0]
            scales[some] = tried[some]
        else:
            scales = jnp.where((_error_w4(jnp, groups, tried) == 0) & (tried != 0), tried, scales)
    return scales


def _as_float16(xp: Any, scales: Any) -> Any:
    """f32 numbers that float16 holds; only 0 becomes 0."""
    size = xp.clip(xp.abs(scales), _SMALLEST_SCALE, LARGEST_SCALE)
    if xp is np:
        size = size.astype(np.float16).astype(np.float32)
    else:  # XLA drops a cast to float16 and back, and reduce_precision knows no subnormal numbers
        subnormal = jnp.round(size / _SMALLEST_SCALE) * _SMALLEST_SCALE
        size = jnp.where(size < 2.0**-14, subnormal, jax.lax.reduce_precision(size, 5, 10))
    return xp.sign(scales) * size


def _error_w4(xp: Any, groups: Any, scales: Any) -> Any:
    left = groups - _round_w4(xp, groups, scales) * scales[None, :]
    return _dots(xp, left, left)


def _dots(xp: Any, left: Any, right: Any) -> Any:
    # einsum saves numpy a temporary; on a GPU it would be a dot in TF32.
    return np.einsum("kg,kg->g", left, right) if xp is np else jnp.sum(left * right, axis=0)


def _round_w4(xp: Any, groups: Any, steps: Any) -> Any:
    scaled = groups / xp.where(steps == 0, xp.float32(1), steps)[None, :]
    if xp is np:  # in place: the time goes into memory traffic
        return np.clip(np.rint(scaled, out=scaled), -8, 7, out=scaled)
    return jnp.clip(jnp.round(scaled), -8, 7)


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


def outputs_of(weight: Weight) -> int:
    """N of a weight `[N, K]`."""
    return weight.scales.shape[-1] if isinstance(weight, W4 | W8) else weight.shape[0]


def padded_inputs(weight: W4) -> int:
    """K of a weight `[N, K]` with the zeros that fill its last block."""
    return 4 * weight.packed.shape[0]


def take_rows(weight: Weight, ids: Int[Array, ...], in_features: int | None = None) -> Float[Array, "... K"]:
    """Rows of an embedding table, f32. Ids outside the table are clipped into it; `in_features` as in `dequantise`."""
    if isinstance(weight, W4):
        flat = ids.reshape(-1)
        packed = jnp.take(weight.packed, flat, axis=1, mode="clip")
        scales = jnp.take(weight.scales, flat, axis=1, mode="clip")
        return dequantise(W4(packed, scales, weight.group_size), in_features).reshape(*ids.shape, -1)
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
