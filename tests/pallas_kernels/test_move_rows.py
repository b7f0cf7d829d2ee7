"""Rows that move to the front of their block: both implementations against a loop over token indices."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.drafting import LARGE_MOVE_ROWS, SMALL_MOVE_ROWS, MoveRowsCase
from pallas_kernels.move_rows import api, triton
from pallas_kernels.operations import moved_rows, shapes
from tests.pallas_kernels.running import each_case, lower, one_program

RUN = {
    "reference": one_program(api.move_rows, implementation="reference"),
    "triton": functools.partial(triton.move_rows, interpret=True),
}


@pytest.mark.parametrize("implementation", RUN)
@each_case(SMALL_MOVE_ROWS)
def test_what_was_on_the_path_is_at_the_front(case: MoveRowsCase, implementation: str) -> None:
    (first, others, path, table, starts), keywords = case.arguments()
    pools = [first, *others]
    expected = [np.array(pool) for pool in pools]
    for slot, start in enumerate(case.starts):

        def place(token: int, slot: int = slot) -> int:
            number, offset = divmod(token, case.page_size)
            return int(table[slot, number % case.pages]) * case.page_size + offset

        for row in range(case.rows):
            for pool, new in zip(pools, expected, strict=True):
                new[place(start + row)] = pool[place(start + int(path[slot, row]))]
    moved = RUN[implementation](pools, path, table, starts, **keywords)
    assert not np.array_equal(moved[0], pools[0])
    for found, new in zip(moved, expected, strict=True):
        np.testing.assert_array_equal(found, new)


@pytest.mark.parametrize("implementation", RUN)
def test_rows_past_the_last_page_are_nobodys(implementation: str) -> None:
    pool = jnp.tile(jnp.arange(48, dtype=jnp.float32)[:, None, None], (1, 1, 16))
    path, table = jnp.asarray([[0, 2, 5, 3]], jnp.int32), jnp.asarray([[1, 2]], jnp.int32)
    (moved,) = RUN[implementation]([pool], path, table, jnp.asarray([28], jnp.int32), page_size=16, ring=False)
    assert moved[16:, 0, 0].tolist() == [*range(16, 45), 46, int(pool[1, 0, 0]), 47]


@pytest.mark.parametrize("case", [*SMALL_MOVE_ROWS, *LARGE_MOVE_ROWS], ids=lambda case: case.name)
def test_lowers_for_cuda(case: MoveRowsCase) -> None:
    positional, keywords = shapes(case)
    assert "triton" in lower(functools.partial(moved_rows, **keywords, implementation="triton"), positional)


def test_wrong_arguments_are_refused() -> None:
    (pool, _, *rest), keywords = MoveRowsCase("", (3,), 4, ((1, 24),), 16, 2).arguments()
    with pytest.raises(NotImplementedError, match="head_dim 24"):
        api.move_rows([pool], *rest, **keywords, implementation="triton")
    with pytest.raises(NotImplementedError, match="'scatter'"):
        api.move_rows([pool], *rest, **keywords, implementation="scatter")
