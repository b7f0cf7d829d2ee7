"""Weights formats: what a matrix becomes when it is converted."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax.numpy as jnp

from checkpoints.errors import CheckpointError
from dflash_jax.models.parameters import Parameter
from pallas_kernels.quantised_matmul.api import Weight, quantise_w4, quantise_w8

WeightsFormat = Literal["f32", "bf16", "w8", "w4"]
_ROW_LOOKUP = ("embed", "lm_head")
"""Matrices that w4 stores as w8: rows of them are looked up, and small errors in them show in every token."""


def check_format(weights: str) -> None:
    """Raises CheckpointError for a format that does not exist."""
    if weights not in get_args(WeightsFormat):
        raise CheckpointError(f"weights format {weights!r}: expected one of {', '.join(get_args(WeightsFormat))}")


def encode(name: str, parameter: Parameter, values: Any, weights: str, group_size: int) -> Weight:
    """One parameter, a numpy array of f32, in a weights format, of numpy arrays too. Norms and biases stay f32."""
    if not parameter.matrix or weights == "f32":
        return values
    if weights == "bf16":
        return values.astype(jnp.bfloat16)
    if weights == "w8" or name in _ROW_LOOKUP:
        return quantise_w8(values)
    return quantise_w4(values, group_size)
