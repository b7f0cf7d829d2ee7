"""Rows times the matrices of the groups that they chose: the public name. What mixture of experts is made of."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import mosaic, reference, triton
from pallas_kernels.hopper import on_hopper
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
    `implementation` is reference, triton or mosaic; None picks, on a GPU, mosaic for the rows of a chunk (on Hopper
    cards) and triton for what it takes, and reference otherwise.
    Raises NotImplementedError when the named one cannot take this weight, ValueError when shapes do not fit.
    """
    name = _implementation_for(x, weight, chosen, groups, activation is not None, implementation)
    run = _IMPLEMENTATIONS[name].grouped_matmul
    return run(x, weight, chosen, groups=groups, activation=activation)


def grouped_products(
    x: Float[Array, "R K"],
    weight: Weight,
    chosen: Int[Array, "R A"],
    *,
    groups: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "places N"], Int[Array, " choices"] | None]:
    """`grouped_matmul` without an activation, its results left where a kernel puts them: for who looks rows up anyway.

    The result of choice `r * A + a` stands at its place in the list that comes second; without a list, where its number
    says. Raises what `grouped_matmul` raises.
    """
    name = _implementation_for(x, weight, chosen, groups, False, implementation)
    if name == "mosaic":
        return mosaic.products(x, weight, chosen, groups=groups)
    result = _IMPLEMENTATIONS[name].grouped_matmul(x, weight, chosen, groups=groups)
    return result.reshape(chosen.size, -1), None


def _implementation_for(x: Array, weight: Weight, chosen: Array, groups: int, gated: bool, asked: str | None) -> str:
    outputs = outputs_of(weight)
    if outputs % (2 * groups if gated else groups):
        raise ValueError(f"a weight of {outputs} rows does not hold {groups} matrices of one shape")
    if len(chosen) != len(x):
        raise ValueError(f"x has {len(x)} rows, chosen {len(chosen)}: every row chooses its groups")
    if asked is None and on_hopper() and mosaic.why_not(chosen.size, x.dtype, weight, groups=groups) is None:
        return "mosaic"
    fits = triton.why_not(x.dtype, weight, groups=groups, gated=gated) is None
    return choose("grouped_matmul", asked, triton_fits=fits, known=tuple(_IMPLEMENTATIONS))
