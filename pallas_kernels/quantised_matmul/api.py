"""Linear maps with dense, 8-bit and 4-bit weights: the public names."""

from __future__ import annotations

import math

import jax
from jaxtyping import Array, Float

from pallas_kernels.hopper import on_hopper
from pallas_kernels.quantised_matmul import int8_activations, mosaic, reference, triton
from pallas_kernels.quantised_matmul.weights import (
    W4,
    W8,
    Weight,
    concatenate,
    dequantise,
    pack_w4,
    padded_inputs,
    quantise_w4,
    quantise_w8,
    take_rows,
    unpack_w4,
)

__all__ = [
    "IMPLEMENTATIONS",
    "W4",
    "W8",
    "Weight",
    "concatenate",
    "dequantise",
    "matmul",
    "matmul_parts",
    "pack_w4",
    "quantise_w4",
    "quantise_w8",
    "take_rows",
    "unpack_w4",
]

HOPPER = ("mosaic",)
IMPLEMENTATIONS = ("reference", "int8_activations", "triton", *HOPPER)
_LARGEST_DENSE = 1 << 26
"""Bytes: of 231 MB, a matmul of few rows takes 88 µs by XLA and 130 µs on Triton (H100)."""


def matmul(x: Float[Array, "... K"], weight: Weight, *, implementation: str | None = None) -> Float[Array, "... N"]:
    """`x @ weight.T` in the dtype of x, accumulated in f32 (W8 on a CPU: in int32).

    `implementation` is one of IMPLEMENTATIONS; None picks int8_activations for W8 on a CPU; on a GPU mosaic for more
    rows of W4 than a step has (on Hopper cards), triton for W4 and for few rows; reference otherwise. Big dense weights
    are the reference's: XLA reads these faster. It times several kernels for a matmul of a shape and keeps its choice
    (in memory and in the persistent cache), so that the programs of plain steps and of blocks have the same one.
    W4 is not the reference's: XLA makes the weights of all layers dense before it needs them, which memory does not
    hold.
    Raises NotImplementedError when the named implementation cannot take this weight, ValueError when shapes do not fit.
    """
    _check(x, weight)
    if implementation is None:
        implementation = _default(x, weight)
    if implementation == "int8_activations":
        if not isinstance(weight, W8):
            raise NotImplementedError(f"int8_activations takes W8 weights, got {type(weight).__name__}: use reference")
        return int8_activations.matmul(x, weight)
    if implementation == "triton":
        return triton.matmul(x, weight)
    if implementation == "mosaic":
        return mosaic.matmul(x, weight)
    if implementation == "reference":
        return reference.matmul(x, weight)
    raise NotImplementedError(f"matmul has no implementation {implementation!r}: use one of {IMPLEMENTATIONS}")


def matmul_parts(
    x: Float[Array, "... K"], weight: Weight, *, implementation: str | None = None
) -> Float[Array, "parts ... N"]:
    """What adds up to `x @ weight.T`: for operations that add it up themselves while they read it.

    On Triton in f32 for few rows, one part for every share of the inputs; else one part in the dtype of x.
    """
    _check(x, weight)
    chosen = implementation or _default(x, weight)
    if chosen == "triton" and triton.few_rows(_rows(x)):
        return triton.matmul_parts(x, weight)
    return matmul(x, weight, implementation=chosen)[None]


def _default(x: Array, weight: Weight) -> str:
    backend = jax.default_backend()
    if backend == "cpu" and isinstance(weight, W8):
        return "int8_activations"
    if backend != "gpu" or triton.why_not(_rows(x), x.dtype, weight) is not None:
        return "reference"
    if on_hopper() and mosaic.why_not(_rows(x), x.dtype, weight) is None:
        return "mosaic"
    big = not isinstance(weight, W4 | W8) and weight.size * weight.dtype.itemsize > _LARGEST_DENSE
    return "reference" if big else "triton"


def _rows(x: Array) -> int:
    return math.prod(x.shape[:-1])


def _check(x: Array, weight: Weight) -> None:
    columns = x.shape[-1]
    if isinstance(weight, W4):
        held = padded_inputs(weight)
        fits = held - 128 < columns <= held
    else:
        held = (weight.values if isinstance(weight, W8) else weight).shape[1]
        fits = columns == held
    if not fits:
        raise ValueError(f"x has {columns} columns, the weight takes {held}: give x[..., K] for a weight [N, K]")
