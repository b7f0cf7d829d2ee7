"""Log-probabilities of an answer's tokens in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dflash_jax.engine.request import Candidate, TokenLogprobs


class LogprobLog:
    """Gathers what the engine tells. `shape` makes OpenAI's object of it; without a shape nobody has asked."""

    def __init__(self, shape: Callable[[Sequence[TokenLogprobs]], dict[str, Any]] | None) -> None:
        self._shape = shape
        self._told: list[TokenLogprobs] = []
        self._streamed = 0

    def add(self, told: Sequence[TokenLogprobs]) -> None:
        """Takes in the next tokens."""
        self._told.extend(told)

    def attach(self, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The choices of a stream, the first of them with what has not been streamed; it waits if there is none."""
        if self._shape and choices and self._streamed < len(self._told):
            choices[0]["logprobs"] = self._shape(self._told[self._streamed :])
            self._streamed = len(self._told)
        return choices

    def whole(self) -> dict[str, Any] | None:
        """All of it, or null."""
        return self._shape(self._told) if self._shape else None


def chat_logprobs(told: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The object of chat completions."""
    content = [{**_chat(one.token), "top_logprobs": [_chat(other) for other in one.top]} for one in told]
    return {"content": content, "refusal": None}


def text_logprobs(told: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The object of text completions. The token itself is always among `top_logprobs`."""
    return {
        "tokens": [_spell(one.token) for one in told],
        "token_logprobs": [one.token.logprob for one in told],
        "top_logprobs": [{_spell(other): other.logprob for other in (*one.top, one.token)} for one in told],
        "text_offset": [one.place for one in told],
    }


def _chat(candidate: Candidate) -> dict[str, Any]:
    data = candidate.token_bytes
    return {"token": data.decode("utf-8", "replace"), "logprob": candidate.logprob, "bytes": list(data)}


def _spell(candidate: Candidate) -> str:
    """Its text; OpenAI's notation of bytes that are no whole character keeps them apart as keys."""
    try:
        return candidate.token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in candidate.token_bytes)
