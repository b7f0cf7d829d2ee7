"""One answer of the engine as an asyncio program sees it: events to await, and an end when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from dflash_jax.engine.request import Event, Finished, Request


class Handle(Protocol):
    """A submitted request."""

    @property
    def prompt_end(self) -> str:
        """The last characters of the prompt, special tokens included."""
        ...

    def cancel(self) -> None:
        """Ends the request soon; without effect when it has ended."""
        ...


class Engine(Protocol):
    """What the server needs of dflash_jax.Engine."""

    @property
    def model_id(self) -> str:
        """The name under which the model is served."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template, if it has one."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens in the window, prompt and answer together."""
        ...

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Handle:
        """Queues a request; raises RequestError or OverloadedError at once."""
        ...

    def gauges(self) -> dict[str, float]:
        """What the metrics page shows of this moment."""
        ...

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compiles what serving needs."""
        ...

    def self_check(self) -> str | None:
        """A warning if the drafter does not seem to belong to the target."""
        ...

    def close(self, drain: bool = False) -> None:
        """Finishes the running answers (drain) or cancels them, and waits for that."""
        ...


class Answer:
    """A running answer. Whoever opens it must close it; closing cancels what has not finished.

    From `open` on, a task listens for the client's disconnect, which ends whatever the reader is waiting for with
    ClientDisconnect.
    """

    def __init__(
        self, handle: asyncio.Future[Any], events: asyncio.Queue[Event | None], watcher: asyncio.Task[None]
    ) -> None:
        self._handle, self._events, self._watcher = handle, events, watcher
        self._finished = False

    @staticmethod
    async def open(
        engine: Engine, request: Request, receive: Receive, on_finished: Callable[[Finished], None]
    ) -> Answer:
        """Submits a request on a worker thread, since rendering and tokenising a long prompt take a while.

        `on_finished` is called on the event loop with the last event, even when the client is gone by then.
        Raises what Engine.submit raises; ClientDisconnect when the client went away meanwhile.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def deliver(event: Event) -> None:
            events.put_nowait(event)
            if isinstance(event, Finished):
                on_finished(event)

        def on_event(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # of a closed loop: the server is gone and nobody listens
                loop.call_soon_threadsafe(deliver, event)

        handle = loop.run_in_executor(None, engine.submit, request, on_event)
        answer = Answer(handle, events, asyncio.create_task(_watch(receive, events)))
        try:
            await asyncio.wait((handle, answer._watcher), return_when=asyncio.FIRST_COMPLETED)
            if not handle.done():
                raise ClientDisconnect
            handle.result()
        except BaseException:
            answer.close()
            raise
        return answer

    @property
    def prompt_end(self) -> str:
        """The last characters of the prompt that the answer goes on from."""
        return self._handle.result().prompt_end

    async def next(self, seconds: float | None = None) -> Event | None:
        """The next event, or None when there is none for so many seconds. Raises ClientDisconnect."""
        try:
            async with asyncio.timeout(seconds):
                event = await self._events.get()
        except TimeoutError:
            return None
        if event is None:
            raise ClientDisconnect
        self._finished = self._finished or isinstance(event, Finished)
        return event

    def close(self) -> None:
        """Cancels the answer unless it has finished; idempotent."""
        self._watcher.cancel()
        if not self._finished:
            self._handle.add_done_callback(_cancel)


async def _watch(receive: Receive, events: asyncio.Queue[Event | None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


def _cancel(handle: asyncio.Future[Any]) -> None:
    if not handle.cancelled() and handle.exception() is None:
        handle.result().cancel()
