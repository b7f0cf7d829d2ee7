from __future__ import annotations

import itertools

import pytest

from dflash_jax.speculate.pace import PLAIN, Pace, StepTimes

TIMES = StepTimes(plain=0.01, blocks={4: 0.015, 8: 0.02, 16: 0.03})
FLAT = StepTimes(plain=0.01, blocks={16: 0.013})


def committed(*steps: int) -> list[int]:
    """The counts of a visit whose steps committed so many tokens each."""
    return [steps.count(tokens) for tokens in range(17)]


def run(accept_length: int, visits: int, times: StepTimes = TIMES) -> list[int]:
    """The rows of each of the visits, for a drafter whose first `accept_length - 1` proposals are right."""
    pace, chosen = Pace(), []
    for _ in range(visits):
        rows = pace.rows(times)
        chosen.append(rows)
        each = min(accept_length, rows) if rows else 1
        pace = pace.observe(times, rows, committed(each, each))
    return chosen


def test_a_good_drafter_always_drafts() -> None:
    assert PLAIN not in run(accept_length=4, visits=200)


@pytest.mark.parametrize(("accept_length", "rows"), [(3, 4), (6, 8), (16, 16)])
def test_as_many_rows_are_verified_as_proposals_survive(accept_length: int, rows: int) -> None:
    assert set(run(accept_length, visits=60)[30:]) == {rows}


def test_where_rows_are_free_all_are_verified() -> None:
    assert set(run(2, visits=100, times=FLAT)) == {16}


def test_a_bad_drafter_is_probed_ever_more_rarely() -> None:
    drafted = [rows != PLAIN for rows in run(accept_length=1, visits=2000)]
    probes = [index for index, drafts in enumerate(drafted) if drafts and index > 4]
    assert drafted[:2] == [True, True]
    assert 4 <= len(probes) <= 12
    assert sorted(gaps := [b - a for a, b in itertools.pairwise(probes)]) == gaps


def test_a_drafter_that_becomes_good_is_found_again() -> None:
    pace = Pace()
    for _ in range(10):
        pace = pace.observe(TIMES, 4, committed(1))
    assert pace.rows(TIMES) == PLAIN
    pace = pace.observe(TIMES, PLAIN, committed(*[1] * 3000))
    assert pace.rows(TIMES) != PLAIN
    for _ in range(8):
        pace = pace.observe(TIMES, 4, committed(4, 4, 4, 4))
    assert pace.rows(TIMES) != PLAIN


def test_expected_tokens_are_those_that_were_seen() -> None:
    pace = Pace()
    for _ in range(100):
        pace = pace.observe(FLAT, 16, committed(1, 3, 3, 5))
    assert abs(pace.expected(16) - 3.0) < 0.1
    assert abs(pace.expected(4) - (1 + 3 + 3 + 4) / 4) < 0.1


def test_without_a_drafter_nothing_is_drafted() -> None:
    assert Pace().rows(StepTimes(plain=0.01)) == PLAIN


def test_times_follow_what_is_measured() -> None:
    times = TIMES
    for _ in range(50):
        times = times.observe(PLAIN, steps=4, seconds=0.2)
    assert abs(times.plain - 0.05) < 1e-3
    assert times.blocks == TIMES.blocks
    assert times.observe(8, steps=0, seconds=1.0) == times
    slower = times.observe(8, steps=1, seconds=0.04)
    assert all(abs(slower.of(rows) / times.of(rows) - 1.2) < 1e-6 for rows in TIMES.blocks)


def test_one_visit_that_was_held_up_does_not_make_a_bad_drafter_pay() -> None:
    times = TIMES.observe(PLAIN, steps=1, seconds=100.0)
    assert times.plain <= 1.2 * TIMES.plain
    pace = Pace()
    for _ in range(10):
        pace = pace.observe(times, 16, committed(1))
    assert pace.rows(times) == PLAIN
