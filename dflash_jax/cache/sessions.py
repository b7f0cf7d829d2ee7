"""Conversations whose KV is on the device: found again by their tokens, forked, truncated, evicted.

A session remembers every token that the client sent or got (`ids`) and which of them the target has read (`kept`). KV
exists for the first `length` kept tokens; in layers with a window only where a later row can see it (models/ring.py).
What was decided for a token is never revisited, so a conversation that grows finds all of its KV again, pruned or not.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from dflash_jax.cache.pages import OutOfPagesError, PageAllocator
from dflash_jax.control.state import ControllerState
from dflash_jax.models.ring import ROLLBACK, Ring

CopyPage = Callable[[int, int], None]
"""Copies the K and V of one page (source, destination) in every pool that has it."""


@dataclasses.dataclass(frozen=True)
class RingPages:
    """The pages of layers with a window: their sizes, which are free, and how one is copied."""

    ring: Ring
    pages: PageAllocator
    copy_page: CopyPage


@dataclasses.dataclass(eq=False)
class Session:
    """One conversation. `prompt_length` is how many of `ids` the client had sent in the latest turn.

    `pages` has a page for every page number of the sequence, `ring` those of layers with a window by their number.
    """

    name: str | None
    controller: ControllerState
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    kept: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.bool_))
    prompt_length: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    ring: dict[int, int] = dataclasses.field(default_factory=dict)
    length: int = 0
    busy: bool = False
    last_used: int = 0

    @property
    def whole_prefix(self) -> int:
        """How many leading tokens are all kept."""
        dropped = np.flatnonzero(~self.kept)
        return int(dropped[0]) if len(dropped) else len(self.kept)

    @property
    def answer_start(self) -> int:
        """Token index of the latest turn's first anchor, from which the same turn would be answered again."""
        return max(0, int(self.kept[: self.prompt_length].sum()) - 1)

    def common_prefix(self, ids: np.ndarray) -> int:
        """How many leading tokens the session shares with a prompt."""
        overlap = min(len(ids), len(self.ids))
        different = np.flatnonzero(self.ids[:overlap] != ids[:overlap])
        return int(different[0]) if len(different) else overlap


class SessionStore:
    """All sessions and their pages. One thread owns it.

    `read_again` counts tokens of known beginnings that had to be prefilled anew because their windows were gone.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        new_controller: Callable[[], ControllerState],
        copy_page: CopyPage,
        rings: RingPages | None = None,
    ) -> None:
        self.pages = PageAllocator(num_pages)
        self.page_size = page_size
        self.read_again = 0
        self._rings = rings
        self._new_controller = new_controller
        self._copy_page = copy_page
        self._sessions: list[Session] = []
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, ids: np.ndarray, name: str | None = None) -> tuple[Session, int]:
        """A session for a prompt and how many of its leading tokens are already decided; the session is busy
        until `end`.

        The prompt's last token always counts as undecided: it is the anchor that the answer starts from.

        A conversation that goes on keeps its session. A prompt that shares only the beginning of one (the same system
        prompt, a retried turn of a running conversation) gets a session of its own that shares the pages. If it asks
        something else, what was dropped for the other's question is undecided again, and all that comes after it.
        Raises OutOfPagesError, and then nothing has changed.
        """
        found = self._find(ids, name)
        if found is None:
            session, known = Session(name, self._new_controller()), 0
            self._sessions.append(session)
        else:
            session, shared = found, found.common_prefix(ids)
            known = min(shared if shared >= found.prompt_length else min(shared, found.whole_prefix), len(ids) - 1)
            if session.busy or known < session.prompt_length:
                session = self._fork(session, name)
        session.busy = True
        session.last_used = next(self._clock)
        try:
            self._truncate(session, known)
        except OutOfPagesError:
            session.busy = False
            if session is not found:
                self.forget(session)
            raise
        return session, known

    def grow(self, session: Session, tokens: int) -> None:
        """Gives the session pages for `tokens` tokens, evicting idle sessions if need be. Raises OutOfPagesError."""
        while len(session.pages) * self.page_size < tokens:
            session.pages.append(self._take(self.pages))

    def slide(self, session: Session, ahead: int) -> None:
        """Gives the session ring pages for `ahead` tokens past its length; takes back those that nothing reads again.

        A session can go on from about its length and from where the latest answer began, so the windows before both
        are kept. Does nothing without rings. Raises OutOfPagesError.
        """
        if self._rings is None:
            return
        ring = self._rings.ring
        kept = {*ring.behind(session.length, ROLLBACK), *ring.behind(session.answer_start, ROLLBACK)}
        first = session.length // self.page_size
        self._release_ring(session, [number for number in session.ring if number < first and number not in kept])
        for number in range(first, -(-(session.length + ahead) // self.page_size)):
            if number not in session.ring:
                session.ring[number] = self._take(self._rings.pages)

    def end(self, session: Session) -> None:
        """The turn is over; pages past the session's length and ring pages that nothing reads again are given back."""
        session.busy = False
        session.last_used = next(self._clock)
        self._trim(session)
        self.slide(session, 0)

    def forget(self, session: Session) -> None:
        """Drops a session and its pages."""
        self._sessions.remove(session)
        self.release(session)

    def forget_all(self) -> None:
        """Drops every session, for when the device has lost what they point to."""
        for session in list(self._sessions):
            self.forget(session)

    def branch(self, session: Session) -> Session:
        """A copy that shares the session's KV and may write on, for work that no session keeps; `release` ends it.

        Raises OutOfPagesError, and then nothing has changed.
        """
        branch = self._share(session, busy=True)
        try:
            self._truncate(branch, len(branch.ids))
        except OutOfPagesError:
            self.release(branch)
            raise
        return branch

    def release(self, session: Session) -> None:
        """Gives back all pages of a session or branch."""
        self.pages.release(session.pages)
        session.pages.clear()
        self._release_ring(session, list(session.ring))
        session.length = 0

    def _find(self, ids: np.ndarray, name: str | None) -> Session | None:
        named = [session for session in self._sessions if name is not None and session.name == name]
        candidates = named or self._sessions

        def worth(session: Session) -> tuple[int, int, bool]:
            common = session.common_prefix(ids)
            return common, self._reachable(session, common) if self._rings else 0, not session.busy

        best = max(candidates, key=worth, default=None)
        return best if best is not None and best.common_prefix(ids) > 0 else None

    def _fork(self, session: Session, name: str | None) -> Session:
        fork = self._share(session, name=name, controller=self._new_controller(), busy=True)
        self._sessions.append(fork)
        return fork

    def _share(self, session: Session, **changed: Any) -> Session:
        self.pages.share(session.pages)
        if self._rings is not None:
            self._rings.pages.share(session.ring.values())
        return dataclasses.replace(session, pages=list(session.pages), ring=dict(session.ring), **changed)

    def _reachable(self, session: Session, known: int) -> int:
        """For how many tokens there is KV that a sequence which shares the first `known` tokens can go on from."""
        length = min(session.length, int(session.kept[:known].sum()))
        return length if self._rings is None else self._rings.ring.reachable(session.ring, length)

    def _truncate(self, session: Session, known: int) -> None:
        """Forgets everything after the first `known` tokens. Pages that others read are left to them."""
        session.ids, session.kept = session.ids[:known], session.kept[:known]
        reachable = self._reachable(session, known)
        self.read_again += min(session.length, int(session.kept.sum())) - reachable
        session.length = reachable
        self._trim(session)
        if session.length % self.page_size == 0:
            return
        last = session.length // self.page_size
        if self.pages.is_shared(session.pages[last]):
            session.pages[last] = self._own(self.pages, session.pages[last], self._copy_page)
        rings = self._rings
        if rings is not None and rings.pages.is_shared(session.ring[last]):
            session.ring[last] = self._own(rings.pages, session.ring[last], rings.copy_page)

    def _trim(self, session: Session) -> None:
        """Gives back the pages past the session's length."""
        needed = -(-session.length // self.page_size)
        self.pages.release(session.pages[needed:])
        del session.pages[needed:]
        self._release_ring(session, [number for number in session.ring if number >= needed])

    def _release_ring(self, session: Session, numbers: list[int]) -> None:
        if self._rings is not None:
            self._rings.pages.release([session.ring.pop(number) for number in numbers])

    def _own(self, allocator: PageAllocator, shared: int, copy_page: CopyPage) -> int:
        """A copy of a page that others read too."""
        own = self._take(allocator)
        copy_page(shared, own)
        allocator.release([shared])
        return own

    def _take(self, allocator: PageAllocator) -> int:
        while not allocator.free:
            idle = [session for session in self._sessions if not session.busy]
            if not idle:
                break
            self.forget(min(idle, key=lambda session: session.last_used))
        return allocator.take()
