"""Conversations whose KV is on the device: found again by their tokens, forked, truncated, evicted.

A session remembers every token that the client sent or got (`ids`) and which of them the target has read (`kept`). KV
exists for the first `length` kept tokens. What was decided for a token is never revisited, so a conversation that grows
finds all of its KV again, pruned or not.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from dflash_jax.cache.pages import OutOfPagesError, PageAllocator
from dflash_jax.control.state import ControllerState

CopyPage = Callable[[int, int], None]
"""Copies the K and V of one page (source, destination) in every pool of the device."""


@dataclasses.dataclass(eq=False)
class Session:
    """One conversation. `prompt_length` is how many of `ids` the client had sent in the latest turn."""

    name: str | None
    controller: ControllerState
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    kept: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.bool_))
    prompt_length: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    length: int = 0
    busy: bool = False
    last_used: int = 0

    @property
    def whole_prefix(self) -> int:
        """How many leading tokens are all kept."""
        dropped = np.flatnonzero(~self.kept)
        return int(dropped[0]) if len(dropped) else len(self.kept)

    def common_prefix(self, ids: np.ndarray) -> int:
        """How many leading tokens the session shares with a prompt."""
        overlap = min(len(ids), len(self.ids))
        different = np.flatnonzero(self.ids[:overlap] != ids[:overlap])
        return int(different[0]) if len(different) else overlap


class SessionStore:
    """All sessions and their pages. One thread owns it."""

    def __init__(
        self, *, num_pages: int, page_size: int, new_controller: Callable[[], ControllerState], copy_page: CopyPage
    ) -> None:
        self.pages = PageAllocator(num_pages)
        self.page_size = page_size
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
            session.pages.append(self._take())

    def end(self, session: Session) -> None:
        """The turn is over; pages past the session's length are given back."""
        session.busy = False
        session.last_used = next(self._clock)
        needed = -(-session.length // self.page_size)
        self.pages.release(session.pages[needed:])
        del session.pages[needed:]

    def forget(self, session: Session) -> None:
        """Drops a session and its pages."""
        self._sessions.remove(session)
        self.pages.release(session.pages)
        session.pages.clear()

    def forget_all(self) -> None:
        """Drops every session, for when the device has lost what they point to."""
        for session in list(self._sessions):
            self.forget(session)

    def borrow(self, count: int) -> list[int]:
        """Pages for work that no session keeps; `pages.release` gives them back. Raises OutOfPagesError."""
        taken: list[int] = []
        try:
            for _ in range(count):
                taken.append(self._take())
        except OutOfPagesError:
            self.pages.release(taken)
            raise
        return taken

    def _find(self, ids: np.ndarray, name: str | None) -> Session | None:
        named = [session for session in self._sessions if name is not None and session.name == name]
        candidates = named or self._sessions
        best = max(candidates, key=lambda session: (session.common_prefix(ids), not session.busy), default=None)
        return best if best is not None and best.common_prefix(ids) > 0 else None

    def _fork(self, session: Session, name: str | None) -> Session:
        self.pages.share(session.pages)
        fork = dataclasses.replace(
            session, name=name, pages=list(session.pages), controller=self._new_controller(), busy=True
        )
        self._sessions.append(fork)
        return fork

    def _truncate(self, session: Session, known: int) -> None:
        """Forgets everything after the first `known` tokens. Pages that others read are left to them."""
        session.ids, session.kept = session.ids[:known], session.kept[:known]
        session.length = min(session.length, int(session.kept.sum()))
        needed = -(-session.length // self.page_size)
        self.pages.release(session.pages[needed:])
        del session.pages[needed:]
        if session.length % self.page_size and self.pages.is_shared(session.pages[-1]):
            own, shared = self._take(), session.pages[-1]
            self._copy_page(shared, own)
            self.pages.release([shared])
            session.pages[-1] = own

    def _take(self) -> int:
        while not self.pages.free:
            idle = [session for session in self._sessions if not session.busy]
            if not idle:
                break
            self.forget(min(idle, key=lambda session: session.last_used))
        return self.pages.take()
