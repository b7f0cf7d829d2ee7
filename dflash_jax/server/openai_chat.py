"""OpenAI's /v1/chat/completions and /v1/completions, streamed and whole."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dflash_jax.engine.request import Finished, Request, TextDelta
from dflash_jax.server.answers import Answer, Engine
from dflash_jax.server.bodies import ChatBody, CompletionBody, GenerationBody, read_body
from dflash_jax.server.errors import ApiError, failed, overloaded
from dflash_jax.server.metrics import Metrics
from dflash_jax.server.openai_deltas import ChatMessage
from dflash_jax.server.openai_logprobs import LogprobLog, chat_logprobs, text_logprobs
from dflash_jax.server.tool_choice import read_choice
from dflash_jax.server.tools import Family
from dflash_jax.server.tools.events import Piece
from dflash_jax.server.usage import usage

KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


async def chat_completions(request: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    body = await read_body(request, ChatBody)
    family: Family = request.app.state.family
    choice = read_choice(body, family)

    def shape(prompt_end: str) -> _Shape:
        message = ChatMessage(family.parser(prompt_end, choice.schemas))
        return _Chat(request.app.state.engine.model_id, message, choice.opening(prompt_end), bool(body.logprobs))

    return await _answer(
        request,
        body,
        shape,
        messages=body.messages,
        tools=choice.tools,
        answer_start=choice.opening_text if choice.forced else None,
        template_variables=body.chat_template_kwargs or {},
        continue_final=bool(body.continue_final_message),
    )


async def completions(request: HttpRequest) -> Response:
    """POST /v1/completions."""
    body = await read_body(request, CompletionBody)

    def shape(_: str) -> _Shape:
        return _Text(request.app.state.engine.model_id, body.logprobs is not None)

    return await _answer(request, body, shape, prompt=body.text)


class _Shape(Protocol):
    """How a protocol writes an answer."""

    head: dict[str, Any]
    stream_object: str
    whole_object: str

    def opening(self) -> list[dict[str, Any]]: ...

    def pieces(self, delta: TextDelta) -> list[dict[str, Any]]: ...

    def ending(self, reason: str) -> list[dict[str, Any]]: ...

    def whole(self, reason: str) -> dict[str, Any]:
        """All that `pieces` was given; instead of `ending`."""
        ...


class _Chat:
    stream_object, whole_object = "chat.completion.chunk", "chat.completion"

    def __init__(self, model: str, message: ChatMessage, start: list[Piece], logprobs: bool) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._message, self._logprobs = message, LogprobLog(chat_logprobs if logprobs else None)
        self._first = [{"role": "assistant", "content": ""}, *message.begin(start)]

    def opening(self) -> list[dict[str, Any]]:
        return [_choice(delta=piece) for piece in self._first]

    def pieces(self, delta: TextDelta) -> list[dict[str, Any]]:
        self._logprobs.add(delta.logprobs)
        return self._logprobs.attach([_choice(delta=piece) for piece in self._message.add(delta)])

    def ending(self, reason: str) -> list[dict[str, Any]]:
        rest = [_choice(delta=piece) for piece in self._message.finish()]
        return self._logprobs.attach([*rest, _choice(self._message.finish_reason(reason), delta={})])

    def whole(self, reason: str) -> dict[str, Any]:
        self._message.finish()
        choice = _choice(self._message.finish_reason(reason), message=self._message.message)
        return {**choice, "logprobs": self._logprobs.whole()}


class _Text:
    stream_object = whole_object = "text_completion"

    def __init__(self, model: str, logprobs: bool) -> None:
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._texts: list[str] = []
        self._logprobs = LogprobLog(text_logprobs if logprobs else None)

    def opening(self) -> list[dict[str, Any]]:
        return []

    def pieces(self, delta: TextDelta) -> list[dict[str, Any]]:
        self._texts.append(delta.text)
        self._logprobs.add(delta.logprobs)
        return self._logprobs.attach([_choice(text=delta.text)] if delta.text else [])

    def ending(self, reason: str) -> list[dict[str, Any]]:
        return self._logprobs.attach([_choice(reason, text="")])

    def whole(self, reason: str) -> dict[str, Any]:
        return {**_choice(reason, text="".join(self._texts)), "logprobs": self._logprobs.whole()}


def _choice(reason: str | None = None, **content: Any) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


async def _answer(
    request: HttpRequest, body: GenerationBody, make_shape: Callable[[str], _Shape], **prompt: Any
) -> Response:
    body.check_supported()
    engine: Engine = request.app.state.engine
    metrics: Metrics = request.app.state.metrics
    asked = Request(**prompt, sampling=body.sampling(), session=body.session_hint(request.headers))
    answer = await Answer.open(engine, asked, request.receive, metrics.observe)
    shape = make_shape(answer.prompt_end)
    if body.stream:
        return _EventStream(answer, _events(answer, shape, body.include_usage, request.app.state.keep_alive))
    try:
        return JSONResponse(await _whole(answer, shape))
    finally:
        answer.close()


async def _whole(answer: Answer, shape: _Shape) -> dict[str, Any]:
    while True:
        event = await answer.next()
        if isinstance(event, TextDelta):
            shape.pieces(event)
        elif isinstance(event, Finished):
            if error := _error(event):
                raise error
            choice = shape.whole(event.reason)
            return {**shape.head, "object": shape.whole_object, "choices": [choice], "usage": usage(event.stats)}


async def _events(answer: Answer, shape: _Shape, include_usage: bool, keep_alive: float) -> AsyncIterator[bytes]:
    """The answer as server-sent events. An error in the middle is an event of its own, then the stream ends."""
    head = {**shape.head, "object": shape.stream_object}
    if include_usage:
        head["usage"] = None
    for choice in shape.opening():
        yield _event({**head, "choices": [choice]})
    while True:
        event = await answer.next(keep_alive)
        if event is None:
            yield KEEP_ALIVE
        elif isinstance(event, TextDelta):
            for choice in shape.pieces(event):
                yield _event({**head, "choices": [choice]})
        else:
            break
    if error := _error(event):
        yield _event(error.body)
    else:
        for choice in shape.ending(event.reason):
            yield _event({**head, "choices": [choice]})
        if include_usage:
            yield _event({**head, "choices": [], "usage": usage(event.stats)})
    yield _DONE


def _error(event: Finished) -> ApiError | None:
    if event.reason == "error":
        return failed(event.error or "the generation failed")
    if event.reason == "cancelled":
        return overloaded("the server is shutting down")
    return None


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


class _EventStream(Response):
    """Sends events as they come and closes the answer whatever happens; the answer's own watcher listens meanwhile."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncIterator[bytes]) -> None:
        self.status_code, self.background = 200, None
        # nginx buffers answers unless told not to
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._stream = answer, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._stream:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._answer.close()
