"""Rows sorted by group times one matrix per group: the public name. What mixture of experts is made of."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quantised_matmul.weights import W4, W8, Weight


def grouped_matmul(x: Float[Array, "M K"], weight: Weight, sizes: Int[Array, " G"]) -> Float[Array, "M N"]:
    """Row m of group g times the g-th matrix: `x[m] @ weight[g].T`, in the dtype of x, accumulated in f32.

    The first `sizes[0]` rows are of group 0, the next `sizes[1]` of group 1, and so on; all sizes add up to M. The
    matrices `[N, K]` of all groups stand below each other in `weight`, in any weights format. Raises ValueError when
    the weight does not hold one matrix per group.
    """
    outputs = weight.scales.shape[-1] if isinstance(weight, W8 | W4) else weight.shape[0]
    if outputs % sizes.shape[0]:
        raise ValueError(f"a weight of {outputs} rows does not hold {sizes.shape[0]} matrices of one shape")
    return reference.grouped_matmul(x, weight, sizes)
