"""An engine without a model: one thread that says words, so that tests see the server and nothing else."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from dflash_jax.engine.request import (
    Candidate,
    DflashStats,
    Event,
    Finished,
    FinishReason,
    Marker,
    OverloadedError,
    PflashStats,
    Request,
    RequestError,
    Stats,
    TextDelta,
    TokenLogprobs,
)

PFLASH = PflashStats(scored_tokens=100, kept_tokens=25, keep_ratio=0.25, score_ms=12.5)
DFLASH = DflashStats(verify_steps=4, committed_tokens=14)


@dataclasses.dataclass(eq=False)
class Handle:
    request: Request
    on_event: Callable[[Event], None]
    prompt_tokens: int
    max_tokens: int
    prompt_end: str = ""
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Says `words`, one token each, to everybody, one after the other. A prompt has as many tokens as words.

    A word that is a Marker is said as one; its place is filled in.
    """

    def __init__(
        self,
        words: Sequence[str | Marker] = ("Paris", " is", " the", " capital", "."),
        *,
        context_length: int = 64,
        delay: float = 0.0,
        prefill: float = 0.0,
        max_queue: int = 8,
        fail_at: int | None = None,
        submit_error: Exception | None = None,
        submit_delay: float = 0.0,
        chat_template: str | None = None,
        prompt_end: str = "",
    ) -> None:
        self.chat_template, self.prompt_end = chat_template, prompt_end
        self.model_id, self.context_length = "fake/model", context_length
        self.words, self.delay, self.prefill, self.fail_at = words, delay, prefill, fail_at
        self.max_queue, self.submit_error, self.submit_delay = max_queue, submit_error, submit_delay
        self.handles: list[Handle] = []
        self.warm = False
        self.warning: str | None = None
        self._waiting: collections.deque[Handle] = collections.deque()
        self._active = 0
        self._closing = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fake device", daemon=True)
        self._thread.start()

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        if progress:
            progress("compiling", 0, 2)
            progress("ready", 2, 2)
        self.warm = True

    def self_check(self) -> str | None:
        return self.warning

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Handle:
        time.sleep(self.submit_delay)
        if self.submit_error:
            raise self.submit_error
        texts = (
            [request.prompt] if request.prompt is not None else [str(m.get("content")) for m in request.messages or ()]
        )
        tokens = sum(len((text or "").split()) for text in texts)
        room = self.context_length - tokens
        if room < 1:
            message = (
                f"This model's maximum context length is {self.context_length} tokens, but the prompt has {tokens}"
            )
            raise RequestError(message, code="context_length_exceeded", param="messages")
        handle = Handle(request, on_event, tokens, min(room, request.sampling.max_tokens or room), self.prompt_end)
        with self._change:
            if len(self._waiting) >= self.max_queue:
                raise OverloadedError(f"the queue is full ({self.max_queue} requests are waiting)")
            self._waiting.append(handle)
            self.handles.append(handle)
            self._change.notify()
        return handle

    def gauges(self) -> dict[str, float]:
        return {
            "queue_depth": len(self._waiting),
            "active_sessions": self._active,
            "pages_used": 3.0,
            "pages_total": 10.0,
        }

    def close(self, drain: bool = False) -> None:
        with self._change:
            self._closing = True
            if not drain:
                for handle in self.handles:
                    handle.cancel()
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                handle = self._waiting.popleft()
                self._active = 1
            self._answer(handle)
            self._active = 0
            handle.ended.set()

    def _answer(self, handle: Handle) -> None:
        started, said = time.perf_counter(), ""
        reason: FinishReason = "length"
        error: str | None = None
        handle.cancelled.wait(self.prefill)
        first = time.perf_counter()
        count = 0
        for count, said_next in enumerate(self.words, 1):
            word, markers = self._spell(said_next, len(said))
            if handle.cancelled.is_set():
                reason, count = "cancelled", count - 1
                break
            if self.fail_at == count:
                reason, error, count = "error", "ValueError: the device is on fire", count - 1
                break
            cuts = [(said + word).find(stop) for stop in handle.request.sampling.stop]
            cut = min((at for at in cuts if at >= 0), default=None)
            logprobs = self._logprobs(handle, word, count, len(said))
            handle.on_event(TextDelta((said + word)[len(said) : cut], (count,), markers, logprobs))
            said += word
            if cut is not None:
                reason = "stop"
                break
            if count == handle.max_tokens:
                break
            handle.cancelled.wait(self.delay)
        else:
            reason = "stop"
        handle.on_event(Finished(reason, self._stats(handle, count, started, first), error))

    @staticmethod
    def _spell(word: str | Marker, place: int) -> tuple[str, tuple[Marker, ...]]:
        if isinstance(word, str):
            return word, ()
        return "" if word.hidden else word.text, (dataclasses.replace(word, place=place),)

    @staticmethod
    def _logprobs(handle: Handle, word: str, count: int, place: int) -> tuple[TokenLogprobs, ...]:
        """Of a word: -0.5, and of others that might stand there."""
        asked = handle.request.sampling.logprobs
        if asked is None:
            return ()
        others = [Candidate(100 + n, bytes([0xE2, 0x80, n]), -1.0 - n) for n in range(asked)]
        return (TokenLogprobs(Candidate(count, word.encode(), -0.5), tuple(others), place),)

    def _stats(self, handle: Handle, count: int, started: float, first: float) -> Stats:
        return Stats(
            prompt_tokens=handle.prompt_tokens,
            cached_tokens=1,
            completion_tokens=count,
            time_to_first_token=first - started,
            total_time=time.perf_counter() - started,
            pflash=PFLASH,
            dflash=DFLASH,
        )
