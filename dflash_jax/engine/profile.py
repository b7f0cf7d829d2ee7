"""Sizes that depend on the device: the one place where a CPU and a GPU differ for the engine."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax.models.config import ModelConfig
from dflash_jax.models.ring import Ring, ring_of
from pallas_kernels.block_attention.ancestry import MOST_ROWS


@dataclasses.dataclass(frozen=True)
class Profile:
    """What programs are compiled for.

    dtype           of activations and KV
    page_size       tokens per page
    chunks          rows of a prefill pass, ascending; a prompt is cut into the fewest passes, then the smallest
    plain_rows      rows of a step that commits one token
    block_rows      rows that a step which drafts may verify, ascending
    max_steps       steps of one visit to the device at most
    visit_seconds   how long a visit should take: what a client that goes away costs, and how finely text streams
    max_sessions    answers that run at the same time
    tree            whether the rows of a step which drafts are a tree of proposals instead of a chain
    """

    dtype: jnp.dtype
    page_size: int
    chunks: tuple[int, ...]
    plain_rows: int
    block_rows: tuple[int, ...]
    max_steps: int
    visit_seconds: float
    max_sessions: int
    tree: bool = False

    @property
    def visit_rows(self) -> int:
        """Rows after a sequence's length that one visit to the device may write."""
        return self.max_steps * max(self.plain_rows, *self.block_rows) + self.block_rows[-1]

    @property
    def tree_rows(self) -> int:
        """Rows of a tree; 0 for a chain."""
        return self.block_rows[-1] if self.tree else 0

    def scored_tokens(self, pages: int) -> int:
        """Tokens that there is room for when a prompt of so many pages is scored: its last chunk may be half empty."""
        return (pages + -(-self.chunks[-1] // self.page_size)) * self.page_size

    def ring(self, config: ModelConfig, pages_per_sequence: int) -> Ring | None:
        """How a model's layers with a window are stored; None if they store all tokens as the others do."""
        return ring_of(
            config,
            chunk=self.chunks[-1],
            visit=self.visit_rows,
            page_size=self.page_size,
            pages_per_sequence=pages_per_sequence,
        )

    def with_tree(self, rows: int | None) -> Profile:
        """Steps that draft verify a tree of so many rows, a chain for 0, or what the profile says for None."""
        if rows is not None and (isinstance(rows, bool) or rows == 1 or not 0 <= rows <= MOST_ROWS):
            raise ValueError(f"a tree of {rows} rows: give 2 to {MOST_ROWS}, the anchor's among them, or 0 for a chain")
        wanted = self.tree if rows is None else rows > 0
        if not wanted:
            return dataclasses.replace(self, tree=False)
        return dataclasses.replace(self, block_rows=(rows,) if rows else self.block_rows, tree=True)

    def chunk_for(self, remaining: int) -> int:
        """Rows of the next prefill pass when so many tokens remain."""
        largest = self.chunks[-1]
        if remaining >= largest:
            return largest
        # A half-empty large pass is still cheaper than several small ones.
        fitting = [chunk for chunk in self.chunks if chunk >= remaining]
        small = self.chunks[0]
        return small if remaining > 0 and -(-remaining // small) * small * 2 <= fitting[0] else fitting[0]


def profile_for_device() -> Profile:
    """The profile of the default device."""
    if jax.default_backend() == "gpu":
        return Profile(
            dtype=jnp.dtype(jnp.bfloat16),
            page_size=128,
            chunks=(128, 1024),
            plain_rows=16,  # as many as a block: they cost the same, and tiles and bits are equal then
            block_rows=(16,),
            max_steps=16,
            visit_seconds=0.03,
            max_sessions=4,
            tree=True,
        )
    return Profile(
        dtype=jnp.dtype(jnp.float32),
        page_size=256,
        chunks=(32, 256),
        plain_rows=1,
        block_rows=(4, 8),  # each is a program to compile, and 16 rows hardly ever pay here
        max_steps=16,
        visit_seconds=0.06,
        max_sessions=2,
    )
