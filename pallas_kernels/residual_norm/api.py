"""What stands between two linear maps of a layer: the public names."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.implementations import choose
from pallas_kernels.residual_norm import reference, triton
from pallas_kernels.residual_norm.reference import add, rms_norm, sum_of

__all__ = ["add", "residual_norm", "rms_norm", "sum_of"]


def residual_norm(
    parts: Float[Array, "parts rows dim"],
    stream: Float[Array, "rows dim"],
    scale: Float[Array, " dim"],
    *,
    post_scale: Float[Array, " dim"] | None = None,
    factor: Float[Array, " 1"] | None = None,
    eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows dim"], Float[Array, "rows dim"]]:
    """The residual stream after an update, and its RMSNorm times `scale`; both in the stream's dtype.

    The update is the sum of `parts` (what `matmul_parts` leaves), in families with sandwich norms normed with
    `post_scale`; where a layer has a `factor`, the new stream is multiplied with it. Norms are computed in f32; the
    update, its norm and the stream are rounded one after the other, as separate layers would do it.
    """
    if stream.shape != parts.shape[1:] or scale.shape != stream.shape[1:]:
        raise ValueError(f"parts {parts.shape}, stream {stream.shape} and scale {scale.shape} do not fit together")
    if post_scale is not None and post_scale.shape != scale.shape:
        raise ValueError(f"post_scale {post_scale.shape} and scale {scale.shape} do not fit together")
    chosen = triton if choose("residual_norm", implementation, triton_fits=True) == "triton" else reference
    return chosen.residual_norm(parts, stream, scale, post_scale=post_scale, factor=factor, eps=eps)
