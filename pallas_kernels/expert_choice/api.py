"""Which experts of a mixture rows go to: the public names."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.expert_choice import reference, triton
from pallas_kernels.expert_choice.reference import Choice
from pallas_kernels.implementations import choose

__all__ = ["Choice", "choose_experts"]


def choose_experts(
    x: Float[Array, "rows dim"],
    router: Float[Array, "experts dim"],
    router_scale: Float[Array, " dim"],
    expert_scale: Float[Array, " experts"],
    scale: Float[Array, " dim"],
    source: Int[Array, " rows"] | None = None,
    *,
    active: int,
    eps: float,
    implementation: str | None = None,
) -> Choice:
    """The `active` experts with the largest softmax of `router @ (x / rms(x) * router_scale)`, largest first.

    Of equal ones the first is taken. All of it is computed in f32: a near tie picks an expert. Weights of a row's
    experts sum to one before each is multiplied with its `expert_scale`. Experts read `x / rms(x) * scale`, in the
    dtype of x. Row r is treated as row `source[r]`, so that rows that nobody reads need no experts of their own.
    `implementation` is reference or triton; None picks triton on a GPU for up to `triton.MOST_ROWS` rows.
    """
    experts, dim = router.shape
    if x.shape[1] != dim or {len(router_scale), len(scale)} != {dim} or len(expert_scale) != experts:
        raise ValueError(
            f"a router of {experts} experts and {dim} numbers does not fit rows of {x.shape[1]}, scales of "
            f"{len(router_scale)} and {len(scale)}, and {len(expert_scale)} experts' scales"
        )
    if not 1 <= active <= experts:
        raise ValueError(f"active is {active}; there are {experts} experts to choose from")
    fits = len(x) <= triton.MOST_ROWS and triton.why_not(router) is None
    implementation = choose("choose_experts", implementation, triton_fits=fits)
    chosen = triton if implementation == "triton" else reference
    return chosen.choose_experts(x, router, router_scale, expert_scale, scale, source, active=active, eps=eps)
