"""What a feed-forward block with experts adds up: the public names."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.expert_sum import reference, triton
from pallas_kernels.implementations import choose


def expert_sum(
    back: Float[Array, "places dim"],
    place: Int[Array, " choices"] | None,
    weights: Float[Array, "rows active"],
    scale: Float[Array, " dim"],
    parts: Float[Array, "parts rows dim"],
    parts_scale: Float[Array, " dim"],
    *,
    eps: float,
    implementation: str | None = None,
) -> Float[Array, "rows dim"]:
    """The weighted sum of what came `back` from a row's experts, and the sum of `parts` beside it, each RMS-normed.

    What row r's a-th expert gave stands at `place[r * active + a]`, or without places at that number itself (see
    `grouped_products`). `parts` are what `matmul_parts` leaves of the dense MLP. Norms are computed in f32; sums, norms
    and the result are rounded one after the other to the dtype of `back`, as separate layers would do it.
    """
    choices, dim = len(back if place is None else place), back.shape[1]
    rows = len(weights)
    if weights.size != choices or parts.shape[1:] != (rows, dim) or {len(scale), len(parts_scale)} != {dim}:
        raise ValueError(
            f"{choices} rows of {dim} came back, weights {weights.shape}, parts {parts.shape} and scales of "
            f"{len(scale)} and {len(parts_scale)} do not fit together"
        )
    chosen = triton if choose("expert_sum", implementation, triton_fits=True) == "triton" else reference
    return chosen.expert_sum(back, place, weights, scale, parts, parts_scale, eps=eps)
