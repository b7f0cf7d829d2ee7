"""Rows of paged pools move to the front of their block: the public name."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Int

from pallas_kernels.implementations import choose
from pallas_kernels.move_rows import reference, triton
from pallas_kernels.move_rows.reference import Pool
from pallas_kernels.paged import why_not


def move_rows(
    pools: Sequence[Pool],
    path: Int[Array, "slots rows"],
    page_table: Int[Array, "slots pages"],
    starts: Int[Array, " slots"],
    *,
    page_size: int,
    ring: bool = False,
    implementation: str | None = None,
) -> tuple[Pool, ...]:
    """The pools, in which what was at the token indices `starts + path` of each slot is at `starts..` too.

    All rows are read before one is written. The pools (K and V of several layers) go by one page table, in a `ring` or
    not, as `attention_rows` describes; rows past a slot's last page are nobody's.
    """
    fits = why_not(page_size, *(pool.shape[2] for pool in pools)) is None
    implementation = choose("move_rows", implementation, triton_fits=fits)
    chosen = triton if implementation == "triton" else reference
    return chosen.move_rows(pools, path, page_table, starts, page_size=page_size, ring=ring)
