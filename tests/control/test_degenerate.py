"""The loop detector against a search over all periods in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.control.degenerate import degenerate


def loops(ids: list[int]) -> bool:
    """The definition, token by token: some period up to 32 repeats for 48 tokens and 4 times."""
    for period in range(1, 33):
        run = 0
        while run < len(ids) - period and ids[-1 - run] == ids[-1 - run - period]:
            run += 1
        if run + period >= max(48, 4 * period):
            return True
    return False


@pytest.mark.parametrize("period", [1, 2, 3, 5, 12, 13, 31, 32])
def test_a_loop_counts_from_four_repeats_and_48_tokens(period: int) -> None:
    least = max(48, 4 * period)
    # 99 differs from what the loop would continue with on its left, so that the loop is not one token longer.
    looped = np.concatenate([np.full(40, 99), np.resize(np.arange(period), least)])
    assert degenerate(looped)
    assert not degenerate(looped[:-1])


def test_a_longer_period_is_not_a_loop() -> None:
    assert not degenerate(np.resize(np.arange(33), 330))


def test_a_loop_that_the_answer_left_does_not_count() -> None:
    assert not degenerate(np.append(np.full(100, 5), 6))


def test_short_and_varied_answers_are_fine() -> None:
    assert not degenerate(np.zeros(0, np.int32))
    assert not degenerate(np.full(47, 3))
    assert not degenerate(np.random.default_rng(0).integers(0, 1000, 500))


@settings(max_examples=150, deadline=None)
@given(
    before=st.lists(st.integers(0, 3), max_size=30),
    loop=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    length=st.integers(0, 170),
    after=st.lists(st.integers(0, 3), max_size=2),
)
def test_random_answers_agree_with_the_definition(
    before: list[int], loop: list[int], length: int, after: list[int]
) -> None:
    ids = before + [loop[i % len(loop)] for i in range(length)] + after
    assert degenerate(np.asarray(ids, np.int32)) == loops(ids)
