"""Gemma 4: calls, strings and thoughts are delimited by tokens of their own, never by what those spell.

<|channel>thought\\n...<channel|>answer<|tool_call>call:NAME{key:<|"|>text<|"|>,list:[1,true]}<tool_call|>
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dflash_jax.engine.request import Marker
from dflash_jax.server.tools.events import (
    Call,
    CallCounter,
    Event,
    Parser,
    Piece,
    Reasoning,
    Text,
    Tools,
    dump,
    spell,
    spelled,
)

CALL, END_CALL, QUOTE, CHANNEL, END_CHANNEL = "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"
_LABEL = "thought"
_DROPPED = (END_CHANNEL, "<|tool_response>", "<tool_response|>")

_QUOTE_MARK = "\ufdd4"
"""A noncharacter that stands for the token <|"|> while a call is parsed; text cannot hold it."""
_HEAD = re.compile(r"\s*call:([^{}\s\ufdd4]+)\s*(?=\{)")
_KEY = re.compile(r"[^:{}\[\],\"\s\ufdd4][^:{}\[\],\ufdd4]*")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_BARE = re.compile(r"[^{}\[\],\ufdd4]+")
_CONSTANTS = {"true": True, "false": False, "null": None, "None": None, "True": True, "False": False}
_JSON_STRING = json.JSONDecoder(strict=False)


def parser(prompt_end: str = "", tools: Tools | None = None) -> Parser:
    """A parser for one answer; the prompt may end within a thought."""
    return _Parser(thinking=_thinks(prompt_end), tools=tools is not None)


def render(calls: Sequence[Call]) -> list[Piece]:
    """Calls as the model's template writes them: keys sorted without regard to case."""
    pieces: list[Piece] = []
    for call in calls:
        pieces += [_marker(CALL), f"call:{call.name}", *_render_object(call.arguments), _marker(END_CALL)]
    return pieces


def opening(name: str | None, prompt_end: str = "") -> list[Piece]:
    """The beginning of a call, after the end of a thought that the prompt opened."""
    thinking = [_marker(END_CHANNEL)] if _thinks(prompt_end) else []
    return [*thinking, _marker(CALL), "call:" if name is None else f"call:{name}{{"]


def _thinks(prompt_end: str) -> bool:
    return prompt_end.rstrip("\n").endswith(CHANNEL + _LABEL)


class _Parser:
    """What `_pieces` holds depends on the state: the label of a channel, or the body of a call."""

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        self._state: Literal["content", "label", "reasoning", "call"] = "reasoning" if thinking else "content"
        self._tools = tools
        self._pieces: list[Piece] = []
        self._newlines = ""
        self._calls = CallCounter()

    def feed(self, pieces: Iterable[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            events += self._text(piece) if isinstance(piece, str) else self._marker(piece)
        return events

    def finish(self) -> list[Event]:
        if self._state == "call":
            return self._end_call(None)
        return self._end_thought(complete=False)

    def _text(self, text: str) -> list[Event]:
        if self._state == "call":
            self._pieces.append(text)
            return []
        if self._state == "label":
            self._pieces.append(text)
            return self._label()
        if self._state == "reasoning":
            text = self._newlines + text
            said = text.rstrip("\n")
            self._newlines = text[len(said) :]
            return [Reasoning(said)] if said else []
        return [Text(text)] if text else []

    def _marker(self, marker: Marker) -> list[Event]:
        kind = marker.text
        if self._state == "call":
            if kind == END_CALL:
                return self._end_call(marker)
            if kind != CALL:
                self._pieces.append(marker)
                return []
            return [*self._end_call(None), *self._marker(marker)]
        if kind == CALL:
            events = self._end_thought(complete=True)
            self._state = "call" if self._tools else "content"
            return events if self._tools else [*events, Text(CALL)]
        if kind == CHANNEL:
            events = self._end_thought(complete=True)
            self._state = "label"
            return events
        if kind in _DROPPED:
            return self._end_thought(complete=True)
        return self._text(spell(marker, (QUOTE, END_CALL)))

    def _label(self) -> list[Event]:
        """The line that names a channel is not part of a thought, unless it is another than expected."""
        label, line_end, rest = spelled(self._pieces).partition("\n")
        if not line_end:
            return []
        self._state, self._pieces = "reasoning", []
        return self._text(rest if label.strip() == _LABEL else label + line_end + rest)

    def _end_thought(self, *, complete: bool) -> list[Event]:
        """Leaves a thought; newlines before its end belong to the markup."""
        state, self._state = self._state, "content"
        label, self._pieces = spelled(self._pieces), []
        newlines, self._newlines = self._newlines, ""
        if state == "label" and label.strip() not in ("", _LABEL):
            return [Reasoning(label)]
        return [Reasoning(newlines)] if state == "reasoning" and newlines and not complete else []

    def _end_call(self, end: Marker | None) -> list[Event]:
        pieces, self._pieces, self._state = self._pieces, [], "content"
        call = parse_call(pieces)
        if call is not None:
            return self._calls.tell(*call)
        return [Text(CALL + spelled(pieces) + (END_CALL if end else ""))]


def parse_call(pieces: Sequence[Piece]) -> tuple[str, str] | None:
    """Name and arguments (as JSON) of the call between its markers; None if it is not sound."""
    text = "".join(
        piece.replace(_QUOTE_MARK, "\ufffd")
        if isinstance(piece, str)
        else _QUOTE_MARK
        if piece.text == QUOTE
        else spell(piece)
        for piece in pieces
    )
    head = _HEAD.match(text)
    if head is None:
        return None
    try:
        arguments, place = _object(text, head.end())
        return None if text[place:].strip() else (head[1], dump(arguments))
    except (ValueError, IndexError, RecursionError):
        return None


def _object(text: str, place: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    place = _space(text, place + 1)
    while text[place] != "}":
        if found:
            place = _expect(text, place, ",")
        key, place = _key(text, place)
        found[key], place = _value(text, _expect(text, place, ":"))
        place = _space(text, place)
    return found, place + 1


def _list(text: str, place: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    place = _space(text, place + 1)
    while text[place] != "]":
        if found:
            place = _expect(text, place, ",")
        value, place = _value(text, place)
        found.append(value)
        place = _space(text, place)
    return found, place + 1


def _value(text: str, place: int) -> tuple[Any, int]:
    place = _space(text, place)
    first = text[place]
    if first == "{":
        return _object(text, place)
    if first == "[":
        return _list(text, place)
    if first in (_QUOTE_MARK, '"'):
        return _string(text, place)
    bare = _BARE.match(text, place)
    if bare is None:
        raise ValueError("a value is missing")
    word = bare[0].strip()
    if word in _CONSTANTS:
        return _CONSTANTS[word], bare.end()
    # Words without quotes are what models write when they forget them.
    return json.loads(word) if _NUMBER.fullmatch(word) else word, bare.end()


def _key(text: str, place: int) -> tuple[str, int]:
    place = _space(text, place)
    if text[place] in (_QUOTE_MARK, '"'):
        return _string(text, place)
    key = _KEY.match(text, place)
    if key is None:
        raise ValueError("a key is missing")
    return key[0].rstrip(), key.end()


def _string(text: str, place: int) -> tuple[str, int]:
    if text[place] == '"':
        return _JSON_STRING.raw_decode(text, place)
    end = text.index(_QUOTE_MARK, place + 1)
    return text[place + 1 : end], end + 1


def _expect(text: str, place: int, character: str) -> int:
    place = _space(text, place)
    if text[place] != character:
        raise ValueError(f"expected {character}")
    return _space(text, place + 1)


def _space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _render(value: Any) -> list[Piece]:
    if isinstance(value, str):
        return [_marker(QUOTE), value, _marker(QUOTE)]
    if isinstance(value, Mapping):
        return _render_object(value)
    if isinstance(value, list | tuple):
        return ["[", *_with_commas(_render(item) for item in value), "]"]
    return [json.dumps(value)]


def _render_object(value: Mapping[str, Any]) -> list[Piece]:
    items = sorted(value.items(), key=lambda item: item[0].lower())
    return ["{", *_with_commas([*_render_key(key), ":", *_render(item)] for key, item in items), "}"]


def _render_key(key: str) -> list[Piece]:
    plain = _KEY.fullmatch(key) and key.strip() == key
    return [key] if plain else [_marker(QUOTE), key, _marker(QUOTE)]


def _with_commas(items: Iterable[list[Piece]]) -> Iterable[Piece]:
    for index, item in enumerate(items):
        yield from ([","] if index else [])
        yield from item


def _marker(text: str) -> Marker:
    return Marker(0, text, hidden=False)
