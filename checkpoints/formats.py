"""Weights formats: what a matrix becomes when it is converted."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.readers import CheckpointWarning
from dflash_jax.models.parameters import Parameter
from pallas_kernels.quantised_matmul.api import W8, Weight, quantise_w4, quantise_w8
from pallas_kernels.quantised_matmul.weights import BLOCK, LARGEST_SCALE

WeightsFormat = Literal["f32", "bf16", "w8", "w4"]
_ROW_LOOKUP = ("embed", "lm_head")
"""Matrices that w4 stores as w8: rows of them are looked up, and small errors in them show in every token."""

_ROWS_BYTES = 16 << 20


def check_format(weights: str) -> None:
    """Raises CheckpointError for a format that does not exist."""
    if weights not in get_args(WeightsFormat):
        raise CheckpointError(f"weights format {weights!r}: expected one of {', '.join(get_args(WeightsFormat))}")


def encode(name: str, parameter: Parameter, values: Any, weights: str, group_size: int) -> Weight:
    """One parameter, or rows of it, a numpy array of f32, in a weights format, of numpy arrays too.

    Norms and biases stay f32. Warns of weights that w4 cannot hold.
    """
    kind = stored_format(name, parameter, weights)
    if kind == "f32":
        return values
    if kind == "bf16":
        return values.astype(jnp.bfloat16)
    return _by_rows(values) if kind == "w8" else _by_groups(name, values, group_size)


def stored_format(name: str, parameter: Parameter, weights: str) -> str:
    """The format that a parameter gets when a model is converted to `weights`."""
    if not parameter.matrix:
        return "f32"
    return "w8" if weights == "w4" and name in _ROW_LOOKUP else weights


def stored_bytes(name: str, parameter: Parameter, weights: str, group_size: int) -> int:
    """Bytes of what `encode` makes of a parameter."""
    *leading, columns = parameter.shape
    rows = math.prod(leading)
    padded = -(-columns // BLOCK) * BLOCK
    return {
        "f32": 4 * rows * columns,
        "bf16": 2 * rows * columns,
        "w8": rows * (columns + 4),
        "w4": rows * (padded // 2 + padded // group_size * 2),
    }[stored_format(name, parameter, weights)]


def _by_rows(values: Any) -> Weight:
    """w8 of a few rows at a time, so that what is needed in between stays small."""
    step = max(1, _ROWS_BYTES // (4 * values.shape[1]))
    if len(values) <= step:
        return quantise_w8(values)
    parts = [quantise_w8(values[start : start + step]) for start in range(0, len(values), step)]
    joined: Any = [np.concatenate(each) for each in zip(*((part.values, part.scales) for part in parts), strict=True)]
    return W8(*joined)


def _by_groups(name: str, values: Any, group_size: int) -> Weight:
    weight = quantise_w4(values, group_size)
    # Of what is not finite the reader has told.
    if np.any(np.abs(weight.scales) == LARGEST_SCALE) and np.isfinite([values.min(), values.max()]).all():
        warnings.warn(
            f"{name} has weights beyond {8 * LARGEST_SCALE:.0f}, which w4 cuts off: convert to w8 or bf16",
            CheckpointWarning,
            stacklevel=2,
        )
    return weight
