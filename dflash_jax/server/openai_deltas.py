"""A chat answer in OpenAI's shape: deltas as it comes, the whole message at its end."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from dflash_jax.engine.request import TextDelta
from dflash_jax.server.tools.events import (
    CallArguments,
    CallStarted,
    Event,
    Parser,
    Piece,
    Reasoning,
    Text,
)
from dflash_jax.server.tools.pieces import PieceOrder


class ChatMessage:
    """One answer: `add` what the engine says, `finish` it, then read `message` and `finish_reason`."""

    def __init__(self, parser: Parser) -> None:
        self._parser, self._order = parser, PieceOrder()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def begin(self, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        """The deltas of what an answer starts with before the engine says anything."""
        return self._note(self._parser.feed(pieces))

    def add(self, delta: TextDelta) -> list[dict[str, Any]]:
        """The deltas that follow from it."""
        return self._note(self._parser.feed(self._order.push(delta)))

    def finish(self) -> list[dict[str, Any]]:
        """The last deltas."""
        return self._note([*self._parser.feed(self._order.flush()), *self._parser.finish()])

    def finish_reason(self, reason: str) -> str:
        """What OpenAI calls the end of an answer that the engine ended with `reason`."""
        return "tool_calls" if self._calls and reason == "stop" else reason

    @property
    def message(self) -> dict[str, Any]:
        """The message so far."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        return message

    def _note(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        deltas = []
        for event in events:
            if isinstance(event, Text):
                self._content.append(event.text)
                deltas.append({"content": event.text})
            elif isinstance(event, Reasoning):
                self._reasoning.append(event.text)
                deltas.append({"reasoning_content": event.text})
            elif isinstance(event, CallStarted):
                function = {"name": event.name, "arguments": ""}
                call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
                self._calls.append(call)
                deltas.append({"tool_calls": [{"index": event.index, **call, "function": {**function}}]})
            elif isinstance(event, CallArguments):
                self._calls[event.index]["function"]["arguments"] += event.text
                deltas.append({"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]})
        return deltas
