"""Request bodies: read under a limit, parsed strictly, checked against a record; unknown fields are ignored."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.requests import Request

from dflash_jax.engine.request import RANGES, Sampling
from dflash_jax.server.errors import ApiError, overloaded

MAX_BODY_BYTES = 16 * 2**20
BODY_SECONDS = 60.0
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_SESSION_CHARACTERS = 256
MAX_TEMPLATE_VARIABLES = 16

_SESSION_HEADERS = (
    "x-session-id",
    "x-session-affinity",
    "session-id",
    "x-claude-code-session-id",
    "x-openwebui-chat-id",
)

_Body = TypeVar("_Body", bound=BaseModel)

_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]

_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
"""An escape in a JSON string; a surrogate that is not part of a pair is a `half`."""


def _range_of(field: str) -> Any:
    least, most = RANGES[field]
    return Field(ge=least, le=most)


def _check_token_id(key: str) -> str:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise pydantic_core.PydanticCustomError("token_id", "keys must be token ids")
    return key


_TokenId = Annotated[str, pydantic.AfterValidator(_check_token_id)]


def _refuse_token_ids(prompt: Any) -> Any:
    ids = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], list) else prompt
    if isinstance(ids, list) and any(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise pydantic_core.PydanticCustomError("token_ids", "token ids are not supported, send the prompt as a string")
    return prompt


def _check_choice(choice: Any) -> Any:
    if not isinstance(choice, str | dict | None):
        raise pydantic_core.PydanticCustomError("choice", "input should be a string or an object")
    return choice


_TemplateValue = bool | int | float | Annotated[str, Field(max_length=MAX_SESSION_CHARACTERS)] | None


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Record):
    """What goes with `stream`."""

    include_usage: bool | None = None


class GenerationBody(_Record):
    """What chat and text completions have in common. A field that is null counts as absent."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    session: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    n: int | None = None
    presence_penalty: Annotated[float, _range_of("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _range_of("frequency_penalty")] | None = None
    repetition_penalty: Annotated[float, _range_of("repetition_penalty")] | None = None
    logit_bias: dict[_TokenId, Annotated[float, _range_of("logit_bias")]] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """Absent fields take OpenAI's defaults: temperature 1, no filter, as many tokens as the window has room for."""
        return Sampling(
            max_tokens=self.token_limit(),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=self.asked_logprobs(),
        )

    def token_limit(self) -> int | None:
        """Tokens to generate at most."""
        return self.max_tokens

    def asked_logprobs(self) -> int | None:
        """How many alternatives to tell of beside each token's own log-probability; None for nothing at all."""
        raise NotImplementedError

    def session_hint(self, headers: Headers) -> str | None:
        """The conversation that a header or the body names, in the forms that agents send."""
        hints = [*(headers.get(name) for name in _SESSION_HEADERS)]
        hints += [self.session, self.session_id, self.prompt_cache_key, self.user]
        return next((hint[:MAX_SESSION_CHARACTERS] for hint in hints if hint), None)

    def check_supported(self) -> None:
        """Raises ApiError for a field whose value asks for what this server cannot do (yet)."""
        for field, neutral in self._neutral_values().items():
            value = getattr(self, field)
            if value is not None and value not in neutral:
                raise ApiError(
                    400,
                    f"{field} {str(value)[:80]!r} is not supported by this server: leave the field out",
                    param=field,
                    code="unsupported_parameter",
                )

    def _neutral_values(self) -> dict[str, tuple[Any, ...]]:
        return {"n": (1,)}


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions. The engine checks what is inside of a message."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[str | dict[str, Any] | None, pydantic.BeforeValidator(_check_choice)] = None
    chat_template_kwargs: Annotated[dict[str, _TemplateValue], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, _range_of("logprobs")] | None = None

    def token_limit(self) -> int | None:
        """The newer name wins when a client sends both."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def asked_logprobs(self) -> int | None:
        """`top_logprobs` of them if `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_supported(self) -> None:
        """Besides, `top_logprobs` needs `logprobs`."""
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true beside it", param="top_logprobs")

    def _neutral_values(self) -> dict[str, tuple[Any, ...]]:
        return {
            **super()._neutral_values(),
            "add_generation_prompt": (not self.continue_final_message,),
            "response_format": ({"type": "text"},),
        }


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1, max_length=1)], pydantic.BeforeValidator(_refuse_token_ids)
    ]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: Annotated[int, _range_of("logprobs")] | None = None

    def asked_logprobs(self) -> int | None:
        """As many as `logprobs` says."""
        return self.logprobs

    @property
    def text(self) -> str:
        """The one prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def _neutral_values(self) -> dict[str, tuple[Any, ...]]:
        return {**super()._neutral_values(), "echo": (False,), "suffix": ("",), "best_of": (1,)}


async def read_body(request: Request, record: type[_Body]) -> _Body:
    """The body of a request as a record. Raises ApiError 400, 408, 413 or 503, and ClientDisconnect."""
    stopping: asyncio.Event = request.app.state.stopping
    return parse(await _unless(stopping, _read(request)), record)


def parse(data: bytes | bytearray, record: type[_Body]) -> _Body:
    """JSON bytes as a record. Raises ApiError that names the field which is wrong."""
    try:
        value = _from_json(bytes(data).removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the request body must be a JSON object, not a {type(value).__name__}")
    try:
        return record.model_validate(value)
    except pydantic.ValidationError as error:
        raise _field_error(error) from error


def _from_json(data: bytes) -> Any:
    try:
        return pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError:
        # Half a surrogate pair is what is left of text that was cut somewhere: no reason to refuse a conversation.
        whole = _ESCAPE.sub(lambda escape: rb"\ufffd" if escape["half"] else escape[0], data)
        if whole == data:
            raise
        return pydantic_core.from_json(whole, allow_inf_nan=False)


def _field_error(error: pydantic.ValidationError) -> ApiError:
    # Where a field may be of several types, what is wrong within the one that was sent says more than the others.
    first = min(error.errors(include_url=False), key=lambda each: (each["type"].endswith("_type"), -len(each["loc"])))
    # Behind the field's name stand indices of lists, but also the names of the alternatives of a union.
    field = str(first["loc"][0]) + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    given = "" if first["type"] in ("missing", "too_long", "token_ids") else f", not {_short(first['input'])}"
    return ApiError(400, f"{field}: {first['msg'].lower()}{given}", param=field)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 80 else text[:77] + "..."


async def _unless(stopping: asyncio.Event, reading: Coroutine[Any, Any, bytearray]) -> bytearray:
    """What is being read, unless the server stops before it has come: nobody waits for half a body then."""
    task, stop = asyncio.ensure_future(reading), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise overloaded("the server is shutting down")
        return task.result()
    finally:
        task.cancel()
        stop.cancel()


async def _read(request: Request) -> bytearray:
    too_large = ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > MAX_BODY_BYTES:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the request body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from error
    return data
