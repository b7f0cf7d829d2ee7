"""The thread that owns the device: takes jobs from a bounded queue and gives each running answer its turn."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Generator

from dflash_jax.engine.answer import Answer, Job, Shared
from dflash_jax.engine.request import FinishReason, OverloadedError

_log = logging.getLogger(__name__)


class Runner:
    """Runs answers until it is closed. Every method may be called from any thread.

    The list of what runs belongs to the device thread; others ask for its length only.
    """

    def __init__(self, shared: Shared, *, max_sessions: int, max_queue: int = 64) -> None:
        self._shared = shared
        self._max_sessions, self._max_queue = max_sessions, max_queue
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: list[tuple[Answer, Generator[None, None, None]]] = []
        self._change = threading.Condition()
        self._closing = False
        self._abandoning = False
        self._thread = threading.Thread(target=self._run, name="dflash-jax device", daemon=True)
        self._thread.start()

    @property
    def queue_depth(self) -> int:
        """Jobs that wait for a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Answers that run."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises OverloadedError when it is full or the engine is closing."""
        with self._change:
            if self._closing:
                raise OverloadedError("the engine is shutting down")
            if len(self._waiting) >= self._max_queue:
                raise OverloadedError(f"the queue is full ({self._max_queue} requests are waiting)")
            self._waiting.append(job)
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job before its next visit to the device; a job that has finished is left alone."""
        with self._change:
            job.cancelled = True
            self._change.notify()

    def close(self, drain: bool) -> None:
        """Takes no more jobs, finishes the accepted ones (or cancels them) and waits for the thread to end."""
        with self._change:
            self._closing = True
            self._abandoning = not drain
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._running and not self._waiting and not self._closing:
                    self._change.wait()
                if self._closing and not self._running and not self._waiting:
                    return
                self._admit()
            for answer, steps in list(self._running):
                if (answer, steps) not in self._running:
                    continue  # ended by another answer's failure
                if not self._advance(answer, steps) and (answer, steps) in self._running:
                    self._running.remove((answer, steps))

    def _admit(self) -> None:
        for job in [job for job in self._waiting if self._is_cancelled(job)]:
            self._waiting.remove(job)
            _finish(Answer(job, self._shared), "cancelled")
        while self._waiting and len(self._running) < self._max_sessions:
            answer = Answer(self._waiting.popleft(), self._shared)
            self._running.append((answer, answer.steps()))

    def _is_cancelled(self, job: Job) -> bool:
        return job.cancelled or self._abandoning

    def _advance(self, answer: Answer, steps: Generator[None, None, None]) -> bool:
        """One turn of an answer; whether it goes on. Whatever goes wrong ends this answer alone."""
        if self._is_cancelled(answer.job):
            steps.close()
            _finish(answer, "cancelled")
            return False
        try:
            next(steps)
            return True
        except StopIteration:
            return False
        except Exception as error:  # the next request must find a working engine
            _log.exception("an answer failed")
            _finish(answer, "error", f"{type(error).__name__}: {error}")
            if self._shared.programs.lost:
                self._start_over()
            return False

    def _start_over(self) -> None:
        """The failed program took the pools with it: the KV of all sessions is gone."""
        for answer, steps in self._running:
            steps.close()
            _finish(answer, "error", "the device lost its state; send the request again")
        self._running.clear()
        self._shared.programs.reset()
        self._shared.store.forget_all()


def _finish(answer: Answer, reason: FinishReason, error: str | None = None) -> None:
    try:
        answer.finish(reason, error)
    except Exception:
        _log.exception("an event handler failed")
