"""Llama 3: an answer that is nothing but JSON objects is calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from dflash_jax.engine.request import Marker
from dflash_jax.server.tools.events import Call, CallCounter, Event, Parser, Piece, Text, Tools, spell
from dflash_jax.server.tools.tagged import call_of

_TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;,"
_KEYS = ('"name"', '"parameters"', '"arguments"', '"type"', '"function"')
_FIRST_KEY = re.compile(r'\{\s*("[^"]*"?|[^"\s])?')
_DECODER = json.JSONDecoder(strict=False)


def parser(prompt_end: str = "", tools: Tools | None = None) -> Parser:
    """A parser for one answer."""
    del prompt_end
    return _Parser(tools is not None)


def render(calls: Sequence[Call]) -> list[Piece]:
    """Calls as the model writes them."""
    written = [json.dumps({"name": c.name, "parameters": c.arguments}, ensure_ascii=False) for c in calls]
    return ["; ".join(written)] if written else []


def opening(name: str | None, prompt_end: str = "") -> list[Piece]:
    """The beginning of a call."""
    del prompt_end
    return ['{"name": "' if name is None else f'{{"name": "{name}", "parameters":']


class _Parser:
    """In the state "objects" the text may be a call, in "content" it is not."""

    def __init__(self, tools: bool) -> None:
        self._state: Literal["objects", "content"] = "objects" if tools else "content"
        self._text = ""
        self._calls = CallCounter()

    def feed(self, pieces: Iterable[Piece]) -> list[Event]:
        self._text += "".join(spell(piece) for piece in pieces if not _is_tag(piece))
        return self._read(final=False)

    def finish(self) -> list[Event]:
        return self._read(final=True)

    def _read(self, final: bool) -> list[Event]:
        events: list[Event] = []
        while self._state == "objects":
            start = self._text.lstrip(_BETWEEN if self._calls.count else None)
            if not start and (self._calls.count or not final):
                return events
            if not _may_be_call(start):
                self._state = "content"
                break
            try:
                value, end = _DECODER.raw_decode(start) if "}" in start else (None, 0)
                call = call_of(value)
            except (ValueError, RecursionError):
                value, end, call = None, 0, None
            if call is None:
                if end or final:
                    self._state = "content"
                    break
                return events
            events += self._calls.tell(*call)
            self._text = start[end:]
        if self._text:
            events.append(Text(self._text))
            self._text = ""
        return events


def _is_tag(piece: Piece) -> bool:
    return isinstance(piece, Marker) and piece.text == _TAG


def _may_be_call(text: str) -> bool:
    """Whether the beginning of a text may be that of a call: long answers in JSON must not wait for their end."""
    found = _FIRST_KEY.match(text)
    if found is None:
        return not text
    key = found[1] or ""
    return any(name.startswith(key) for name in _KEYS)
