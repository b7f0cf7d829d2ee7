from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.cache.pages import OutOfPagesError, PageAllocator
from dflash_jax.cache.sessions import RingPages, Session, SessionStore
from dflash_jax.models.ring import ROLLBACK, Ring

PAGE = 4


class Device:
    """What the pages of a pool hold, as the store and its users see them."""

    def __init__(self, num_pages: int = 12, ring: Ring | None = None, num_ring_pages: int = 1) -> None:
        self.rows = np.full((num_pages, PAGE), -1)
        self.ring_rows = np.full((num_ring_pages, PAGE), -1)
        self.ring = ring
        self.store = SessionStore(
            num_pages=num_pages,
            page_size=PAGE,
            new_controller=object,  # type: ignore[arg-type]
            copy_page=lambda source, destination: self.copy(self.rows, source, destination),
            rings=RingPages(
                ring,
                PageAllocator(num_ring_pages),
                lambda source, destination: self.copy(self.ring_rows, source, destination),
            )
            if ring
            else None,
        )

    @staticmethod
    def copy(rows: np.ndarray, source: int, destination: int) -> None:
        rows[destination] = rows[source]

    def turn(
        self, ids: list[int], name: str | None = None, drop: frozenset[int] = frozenset(), answer: int = 0
    ) -> tuple[Session, int]:
        """One request: tokens in `drop` are pruned; KV of a token is the token itself.

        `answer` tokens are generated.
        """
        prompt = np.asarray(ids, np.int32)
        session, known = self.store.begin(prompt, name)
        kept = np.asarray([token not in drop for token in ids[known:]], np.bool_)
        session.ids, session.kept = prompt, np.concatenate([session.kept, kept])
        session.prompt_length = len(ids)
        self.write(session, answer)
        return session, known

    def write(self, session: Session, answer: int = 0) -> None:
        session.ids = np.concatenate([session.ids, 1000 + np.arange(answer, dtype=np.int32)])
        session.kept = np.concatenate([session.kept, np.ones(answer, np.bool_)])
        tokens = session.ids[session.kept]
        self.store.grow(session, len(tokens))
        if self.ring:
            self.write_ring(session, tokens, self.ring)
        for index in range(session.length, len(tokens)):
            self.rows[session.pages[index // PAGE], index % PAGE] = tokens[index]
        session.length = len(tokens)

    def write_ring(self, session: Session, tokens: np.ndarray, ring: Ring) -> None:
        """Chunk by chunk through the ring table, each with padding or rejected rows behind it; then the old length."""
        before = session.length
        for start in range(before, len(tokens), ring.chunk):
            end = min(start + ring.chunk, len(tokens))
            session.length = start
            self.store.slide(session, end - start)
            assert len(session.ring) <= ring.most_held
            table = ring.table(session.ring, start)[0]
            for index in range(start, start + ring.chunk):
                value = tokens[index] if index < end else -2
                self.ring_rows[table[index // PAGE % ring.width], index % PAGE] = value
            for index in range(start, end):
                seen = range(max(0, index - ring.lookback), index + 1)
                found = [self.ring_rows[table[i // PAGE % ring.width], i % PAGE] for i in seen]
                assert found == tokens[seen.start : seen.stop].tolist()
        session.length = before

    def held(self, session: Session) -> list[int]:
        return [int(self.rows[session.pages[i // PAGE], i % PAGE]) for i in range(session.length)]

    def window(self, session: Session) -> list[int]:
        """What the ring pages say of the tokens that the next row sees; all that they hold must be right."""
        assert self.ring is not None
        held = [i for i in range(session.length) if i // PAGE in session.ring]
        found = [int(self.ring_rows[session.ring[i // PAGE], i % PAGE]) for i in held]
        assert found == session.ids[session.kept][held].tolist()
        seen = min(session.length, self.ring.lookback)
        assert held[len(held) - seen :] == list(range(session.length - seen, session.length))
        return found[len(found) - seen :]


def test_a_conversation_that_goes_on_keeps_its_session_and_its_kv() -> None:
    device = Device()
    first, known = device.turn(list(range(10)), answer=3)
    assert known == 0
    device.store.end(first)
    second, known = device.turn([*first.ids.tolist(), 50, 51])
    assert second is first
    assert known == 13
    assert device.held(second) == [*range(10), 1000, 1001, 1002, 50, 51]


def test_decisions_about_old_tokens_are_frozen() -> None:
    device = Device()
    session, _ = device.turn(list(range(10)), drop=frozenset({3, 4}))
    device.store.end(session)
    again, known = device.turn([*range(10), 20, 21])
    assert (again, known) == (session, 10)
    assert device.held(again) == [0, 1, 2, 5, 6, 7, 8, 9, 20, 21]


def test_the_last_token_is_always_undecided() -> None:
    device = Device()
    session, _ = device.turn(list(range(8)))
    device.store.end(session)
    again, known = device.turn(list(range(8)))
    assert known == 7
    assert again.length == 8


def test_a_prompt_with_the_same_beginning_forks_and_disturbs_nobody() -> None:
    device = Device()
    first, _ = device.turn(list(range(10)))
    device.store.end(first)
    second, known = device.turn([*range(6), 90, 91, 92])
    assert second is not first
    assert known == 6
    assert first.pages[0] == second.pages[0]  # a full page is shared
    assert device.held(first) == list(range(10))
    assert device.held(second) == [*range(6), 90, 91, 92]


def test_another_question_about_the_same_document_decides_anew_what_was_dropped() -> None:
    device = Device()
    document = list(range(20))
    first, _ = device.turn([*document, 90], drop=frozenset(range(10, 15)))
    device.store.end(first)
    other, known = device.turn([*document, 91])
    assert other is not first
    assert known == 10  # up to the first token that the other question did without
    assert device.held(other) == [*document, 91]
    device.store.end(other)
    same, known = device.turn([*document, 90])
    assert known == 20 and device.held(same) == [*range(10), *range(15, 20), 90]  # the same question once more
    device.store.end(same)
    again, known = device.turn([*document, 90, 92])
    assert again is first and known == 21  # a conversation that goes on keeps what was decided
    assert device.held(again) == [*range(10), *range(15, 20), 90, 92]


def test_no_page_left_for_a_fork_changes_nothing() -> None:
    device = Device(num_pages=4)  # page 0 and three for the running answer
    first, _ = device.turn(list(range(12)))
    with pytest.raises(OutOfPagesError):
        device.store.begin(np.asarray([*range(6), 50], np.int32))
    assert len(device.store) == 1
    assert device.held(first) == list(range(12))
    device.store.end(first)
    forked, known = device.turn([*range(6), 50])
    assert known == 6 or forked.length == 7


def test_a_running_session_is_forked_not_taken() -> None:
    device = Device()
    running, _ = device.turn(list(range(6)))
    other, known = device.turn([*range(6), 7])
    assert other is not running
    assert known == 6
    device.write(running, answer=4)
    assert device.held(other) == [*range(6), 7]


def test_the_name_decides_before_the_longest_prefix() -> None:
    device = Device()
    mine, _ = device.turn(list(range(4)), name="mine")
    device.store.end(mine)
    theirs, _ = device.turn([*range(4), 8, 9], name="theirs")
    device.store.end(theirs)
    again, _ = device.turn([*range(4), 8, 9, 10], name="mine")
    assert again is mine


def test_idle_sessions_make_room_oldest_first_and_running_ones_stay() -> None:
    device = Device(num_pages=7)
    old, _ = device.turn([1] * 8)
    device.store.end(old)
    running, _ = device.turn([2] * 8)
    new, _ = device.turn([3] * 12)
    assert len(device.store) == 2
    assert device.held(running) == [2] * 8
    assert device.held(new) == [3] * 12
    branch = device.store.branch(running)
    with pytest.raises(OutOfPagesError):
        device.store.grow(branch, 9 * PAGE)
    device.store.release(branch)
    assert device.store.pages.free == 1
    assert device.held(running) == [2] * 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(0, 5)), max_size=12))
def test_any_course_of_conversations_keeps_every_kv_right(turns: list[tuple[int, int, int]]) -> None:
    device = Device(num_pages=40)
    live: list[Session] = []
    for family, length, answer in turns:
        session, _ = device.turn([family, *range(100, 99 + length)], answer=answer)
        live = [*[s for s in live if s is not session], session]
        device.store.end(session)
        for other in live:
            if other.pages:
                assert device.held(other) == other.ids[other.kept][: other.length].tolist()
    for session in live:
        if session.pages:
            device.store.forget(session)
    assert device.store.pages.used == 0


RING = Ring(lookback=5, chunk=8, visit=6, page_size=PAGE)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 150), st.integers(0, 90), st.booleans()), max_size=12))
def test_any_course_of_conversations_keeps_every_window_right(turns: list[tuple[int, int, int, bool]]) -> None:
    device = Device(num_pages=400, ring=RING, num_ring_pages=3 * RING.most_held)
    live: list[Session] = []
    for family, length, answer, goes_on in turns:
        base = live[-1].ids.tolist() if goes_on and live else [family]
        session, _ = device.turn([*base, *range(100, 99 + length)], answer=answer)
        live = [*[s for s in live if s is not session], session]
        device.store.end(session)
        assert RING.reachable(session.ring, session.length) == session.length
        for other in live:
            if other.length:
                tokens = other.ids[other.kept][: other.length].tolist()
                assert device.held(other) == tokens
                assert device.window(other) == tokens[max(0, other.length - RING.lookback) :]
    for session in live:
        if session.length:
            device.store.forget(session)
    rings = device.store._rings
    assert rings is not None and rings.pages.used == device.store.pages.used == 0


def long_answer() -> tuple[Device, Session]:
    """A prompt of 300 tokens and an answer of 200, far longer than the windows that are kept."""
    device = Device(num_pages=600, ring=RING, num_ring_pages=4 * RING.most_held)
    session, _ = device.turn(list(range(300)))
    device.write(session, answer=200)
    device.store.end(session)
    assert len(session.ring) <= RING.most_held
    return device, session


@pytest.mark.parametrize(
    ("prompt", "first_read"),
    [
        ("the same answer", 500),
        ("the answer without its last tokens", 500 - ROLLBACK),
        ("the answer without its beginning", 300),
        ("the same turn once more", 299),
        ("another end of the turn", 300 - ROLLBACK + 1),
        ("another question after the same beginning", 0),
    ],
)
def test_where_a_prompt_goes_on_from(prompt: str, first_read: int) -> None:
    device, session = long_answer()
    answer = session.ids.tolist()
    ids = {
        "the same answer": [*answer, 5],
        "the answer without its last tokens": [*answer[:-ROLLBACK], 5],
        "the answer without its beginning": [*answer[:300], *answer[400:]],
        "the same turn once more": answer[:300],
        "another end of the turn": [*answer[: 300 - ROLLBACK + 1], 5, 6],
        "another question after the same beginning": [*answer[:100], 5, 6],
    }[prompt]
    found, known = device.store.begin(np.asarray(ids, np.int32))
    assert found.length == first_read
    assert device.store.read_again == min(known, 500) - first_read
    assert device.window(found) == ids[max(0, first_read - RING.lookback) : first_read]


def test_a_fork_in_the_middle_of_a_page_writes_on_pages_of_its_own() -> None:
    device, session = long_answer()
    prompt = session.ids[:300].tolist()
    fork, known = device.turn([*prompt[:298], 5, 6, 7])
    assert fork is not session and known % PAGE and fork.ring[(known - 1) // PAGE - 1] in session.ring.values()
    for each in (session, fork):
        assert device.held(each) == each.ids.tolist()
        assert device.window(each) == each.ids[-RING.lookback :].tolist()


def test_a_branch_leaves_its_session_as_it_was() -> None:
    device, session = long_answer()
    session.busy = True
    pages, ring = list(session.pages), dict(session.ring)
    branch = device.store.branch(session)
    branch.ids = np.concatenate([branch.ids, np.full(90, 7, np.int32)])
    branch.kept = np.ones(len(branch.ids), np.bool_)
    device.write(branch)
    assert device.window(branch) == [7] * RING.lookback
    device.store.release(branch)
    assert (session.pages, session.ring) == (pages, ring)
    assert device.window(session) == session.ids[session.length - RING.lookback : session.length].tolist()


def test_allocator_counts_readers() -> None:
    pages = PageAllocator(3)
    page = pages.take()
    pages.share([page])
    assert pages.is_shared(page)
    pages.release([page])
    assert pages.used == 1
    pages.release([page])
    assert pages.used == 0
    assert {pages.take(), pages.take()} == {1, 2}
    with pytest.raises(OutOfPagesError, match="all 2 pages"):
        pages.take()
