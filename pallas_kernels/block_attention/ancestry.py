"""Rows of a block that form a tree instead of a chain: how deep each one is, and which of the others it sees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

MOST_ROWS = 32
"""A row has a bit for each."""
STEP_ROWS = 16
"""Kernels cut the keys of a tree as those of a plain step, which has so many rows: rows of both have the same bits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ancestry:
    """Row 0 is the root. A row at depth d stands where row d of a chain would stand in the text."""

    depths: Int[Array, "B T"]
    sees: UInt32[Array, "B T"]
    """Bit u of entry [b, t]: row t sees row u, which is itself or one of its ancestors."""

    def stored(self, starts: Int[Array, " B"], token: Int[Array, "#B keys"]) -> Int[Array, "B T keys"]:
        """Under which token index each row finds tokens of its text.

        Those before `starts` are where they are, the row's ancestors (and the row) where the block has them; tokens
        behind the row are anywhere.
        """
        row = jnp.arange(self.sees.shape[1], dtype=jnp.int32)
        ancestor = (jnp.right_shift(self.sees[:, :, None], row.astype(jnp.uint32)[None, None, :]) & 1) == 1
        depth = token - starts[:, None]  # [B, keys]
        here = ancestor[:, :, None, :] & (self.depths[:, None, None, :] == depth[:, None, :, None])  # [B, T, keys, T]
        found = starts[:, None, None] + jnp.sum(jnp.where(here, row[None, None, None, :], 0), axis=-1)
        return jnp.where(depth[:, None, :] < 0, token[:, None, :], found)


def bits_of(flags: Bool[Array, "... rows"]) -> UInt32[Array, ...]:
    """Bit u of an entry is flag u."""
    values = jnp.left_shift(jnp.uint32(1), jnp.arange(flags.shape[-1], dtype=jnp.uint32))
    values = jnp.broadcast_to(values, flags.shape)
    return jnp.sum(jnp.where(flags, values, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)
