"""Rows times the matrices of the groups that they chose: the public name. What mixture of experts is made of."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import mosaic, reference, triton
from pallas_kernels.implementations import choose
from pallas_kernels.quantised_matmul.weights import Weight, outputs_of

HOPPER = ("mosaic",)
_IMPLEMENTATIONS = {"reference": reference, "triton": triton, "mosaic": mosaic}


def grouped_matmul(
    x: Float[Array, "R K"],
    weight: Weight,
    chosen: Int[Array, "R A"],
    *,
    groups: int,
    activation: Callable[[Array], Array] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R A N"]:
    """Row r times the matrix of each group that it chose: `x[r] @ weight[chosen[r, a]].T`, accumulated in f32.

    The matrices `[N, K]` of all groups stand below each other in `weight`, in any weights format. With an `activation`
    they are `[2 * N, K]`, gate before up, and what comes out is `activation(gate) * up`, each rounded to the dtype of
    x. Choices outside of the groups are clipped to the first or the last one.
    `implementation` is reference, triton or, for the rows of a chunk on a Hopper card, mosaic; None picks triton on a
    GPU for what it takes, and reference otherwise. (Nobody has measured mosaic yet.)
    Raises NotImplementedError when the named one cannot take this weight, ValueError when shapes do not fit.
    """
    outputs = outputs_of(weight)
    if outputs % (groups if activation is None else 2 * groups):
        raise ValueError(f"a weight of {outputs} rows does not hold {groups} matrices of one shape")
    if len(chosen) != len(x):
        raise ValueError(f"x has {len(x)} rows, chosen {len(chosen)}: every row chooses its groups")
    unfit = triton.why_not(x.dtype, weight, groups=groups, gated=activation is not None)
    implementation = choose("grouped_matmul", implementation, triton_fits=unfit is None, known=tuple(_IMPLEMENTATIONS))
    run = _IMPLEMENTATIONS[implementation].grouped_matmul
    return run(x, weight, chosen, groups=groups, activation=activation)
