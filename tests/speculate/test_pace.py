from __future__ import annotations

import itertools

from dflash_jax.speculate.pace import Pace, StepTimes

TIMES = StepTimes(plain=0.01, block=0.02)


def run(accept_length: int, visits: int) -> list[bool]:
    """Whether each of the visits drafted, for a drafter of that accept length; two steps per visit."""
    pace, drafted = Pace(), []
    for _ in range(visits):
        drafts = pace.drafts(TIMES)
        drafted.append(drafts)
        pace = pace.observe(TIMES, drafted=drafts, steps=2, committed=2 * accept_length if drafts else 2)
    return drafted


def test_a_good_drafter_always_drafts() -> None:
    assert all(run(accept_length=3, visits=200))


def test_a_bad_drafter_is_probed_ever_more_rarely() -> None:
    drafted = run(accept_length=1, visits=2000)
    probes = [index for index, drafts in enumerate(drafted) if drafts and index > 4]
    assert drafted[:2] == [True, True]
    assert 4 <= len(probes) <= 12
    assert sorted(gaps := [b - a for a, b in itertools.pairwise(probes)]) == gaps


def test_a_drafter_that_becomes_good_is_found_again() -> None:
    pace = Pace()
    for _ in range(10):
        pace = pace.observe(TIMES, drafted=True, steps=1, committed=1)
    assert not pace.drafts(TIMES)
    pace = pace.observe(TIMES, drafted=False, steps=3000, committed=3000)
    assert pace.drafts(TIMES)
    pace = pace.observe(TIMES, drafted=True, steps=4, committed=40)
    assert pace.drafts(TIMES)


def test_times_follow_what_is_measured() -> None:
    times = TIMES
    for _ in range(50):
        times = times.observe(drafted=False, steps=4, seconds=0.2)
    assert abs(times.plain - 0.05) < 1e-4
    assert times.block == TIMES.block
    assert times.observe(drafted=True, steps=0, seconds=1.0) == times


def test_one_visit_that_was_held_up_does_not_make_a_bad_drafter_pay() -> None:
    times = TIMES.observe(drafted=False, steps=1, seconds=100 * TIMES.block)
    assert times.plain <= 1.2 * TIMES.plain
    pace = Pace()
    for _ in range(10):
        pace = pace.observe(times, drafted=True, steps=1, committed=1)
    assert not pace.drafts(times)
