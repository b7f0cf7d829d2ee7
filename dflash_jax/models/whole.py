"""A decoder over whole sequences at once, without state between calls."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from dflash_jax.models.decoder import Decoder, Pass, Place, empty_pools

_PAGE_SIZE = 128


def read_whole(
    decoder: Decoder, ids: Int[Array, "batch tokens"], *, dtype: DTypeLike, capture: Sequence[int] = ()
) -> Pass:
    """One pass over every sequence from its first token on; `capture` names layers for `Pass.features`."""
    batch, tokens = ids.shape
    pages = -(-tokens // _PAGE_SIZE)
    table = 1 + jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
    positions = jnp.tile(jnp.arange(tokens, dtype=jnp.int32)[None], (batch, 1))
    place = Place(table, jnp.zeros(batch, jnp.int32), positions, _PAGE_SIZE)
    pools = empty_pools(decoder.config, num_pages=1 + batch * pages, page_size=_PAGE_SIZE, dtype=dtype)
    return decoder(ids, pools, place, capture=capture)
