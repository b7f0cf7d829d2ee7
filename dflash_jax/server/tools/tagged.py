"""Answers in which <tool_call> tags hold calls and, in some families, <think> tags hold thoughts.

The tags are tokens of their own in some vocabularies and plain text in others, so they are found in the text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from dflash_jax.server.tools.events import (
    Call,
    CallCounter,
    Event,
    Piece,
    Reasoning,
    Text,
    dump,
    held_back,
    spell,
)

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
_TAGS = (THINK, END_THINK, CALL, END_CALL)
_SPACE = " \t\r\n"


@dataclasses.dataclass(frozen=True)
class Syntax:
    """How a call is written between its tags."""

    read: Callable[[str], tuple[str, str] | None]
    """Name and arguments (as JSON) of a call; None if the text is anything else."""
    inside: Callable[[str], bool]
    """Whether a text breaks off within a value, so that a closing tag after it belongs to that value."""


def render_tagged(bodies: Iterable[str]) -> list[Piece]:
    """Calls in tags, one under the other."""
    written = [f"{CALL}\n{body}\n{END_CALL}" for body in bodies]
    return ["\n".join(written)] if written else []


def open_tagged(body: str, before: str = "") -> list[Piece]:
    """The beginning of a call, after the end of what comes before."""
    return [f"{before}{CALL}\n{body}"]


def end_of_thought(prompt_end: str) -> str:
    """What ends thoughts that the prompt opened."""
    return f"\n{END_THINK}\n\n" if in_thought(prompt_end) else ""


def in_thought(prompt_end: str) -> bool:
    """Whether a prompt ends with the tag that opens thoughts."""
    return prompt_end.rstrip().endswith(THINK)


def render_json(calls: Sequence[Call]) -> list[Piece]:
    """Calls as JSON."""
    bodies = ({"name": call.name, "arguments": call.arguments} for call in calls)
    return render_tagged(json.dumps(body, ensure_ascii=False) for body in bodies)


def open_json(name: str | None, before: str = "") -> list[Piece]:
    """The beginning of a call as JSON."""
    return open_tagged('{"name": "' if name is None else f'{{"name": "{name}", "arguments":', before)


def call_in(text: str) -> tuple[str, str] | None:
    """Name and arguments (as JSON) of a call written as a JSON object; None if the text is anything else."""
    try:
        return call_of(json.loads(text, strict=False))
    except (ValueError, RecursionError):
        return None


def call_of(value: Any) -> tuple[str, str] | None:
    """The same for a JSON value. Raises ValueError for numbers that JSON does not have, RecursionError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, strict=False)
    return (value["name"], dump(arguments)) if isinstance(arguments, dict) else None


class TaggedParser:
    """The parser of these families.

    The state says what `_text`, the text that is not told of yet, belongs to: "begin" is before anything but space,
    "after" is after thoughts or a call, where space is not content.
    """

    def __init__(self, syntax: Syntax, *, thinks: bool, thinking: bool, tools: bool) -> None:
        self._syntax = syntax
        self._state: Literal["begin", "reasoning", "content", "after", "call"] = "begin"
        self._thinks, self._tools = thinks, tools
        self._text = ""
        self._opening = ""
        self._searched = 0
        self._said_thought = False
        self._calls = CallCounter()
        if thinking:
            self._state = "reasoning"

    def feed(self, pieces: Iterable[Piece]) -> list[Event]:
        """What is certain after these pieces."""
        self._text += "".join(spell(piece, _TAGS) for piece in pieces)
        return self._read(final=False)

    def finish(self) -> list[Event]:
        """The rest."""
        return self._read(final=True)

    def _read(self, final: bool) -> list[Event]:
        events: list[Event] = []
        before = None
        while before != (before := (self._state, len(self._text))):
            if self._state == "begin":
                self._begin(final)
            elif self._state == "reasoning":
                events += self._reason(final)
            elif self._state == "after":
                self._skip_space()
            elif self._state == "content":
                events += self._say(final)
            else:
                events += self._call(final)
        return _joined(events)

    def _begin(self, final: bool) -> None:
        start = self._text.lstrip(_SPACE)
        if self._thinks and start.startswith(THINK):
            self._state, self._text = "reasoning", start[len(THINK) :]
        elif final or not self._thinks or not THINK.startswith(start):
            self._state = "content"

    def _reason(self, final: bool) -> list[Event]:
        if not self._said_thought:
            self._text = self._text.lstrip("\n")
        before, end, after = self._text.partition(END_THINK)
        if end:
            self._state, self._text = "after", after
            before = before.rstrip("\n")
        elif not final:
            kept = len(before) - held_back(before, END_THINK)
            before = before[:kept].rstrip("\n")
            self._text = self._text[len(before) :]
        else:
            self._text = ""
        self._said_thought = self._said_thought or bool(before)
        return [Reasoning(before)] if before else []

    def _skip_space(self) -> None:
        self._text = self._text.lstrip(_SPACE)
        if self._text:
            self._state = "content"

    def _say(self, final: bool) -> list[Event]:
        before, call, after = self._text.partition(CALL) if self._tools else (self._text, "", "")
        if call:
            said = before.rstrip(_SPACE)
            self._state, self._text, self._searched = "call", after, 0
            self._opening = before[len(said) :] + CALL
        elif final or not self._tools:
            said, self._text = before, ""
        else:
            kept = len(before) - held_back(before, CALL)
            said = before[:kept].rstrip(_SPACE)
            self._text = before[len(said) :]
        return [Text(said)] if said else []

    def _call(self, final: bool) -> list[Event]:
        while (end := self._text.find(END_CALL, self._searched)) >= 0:
            body, after = self._text[:end], end + len(END_CALL)
            if call := self._syntax.read(body):
                self._state, self._text = "after", self._text[after:]
                return self._calls.tell(*call)
            if not self._syntax.inside(body):
                return self._malformed(after)
            self._searched = after
        if not final:
            self._searched = max(self._searched, len(self._text) - len(END_CALL) + 1)
            return []
        if call := self._syntax.read(self._text):
            self._state, self._text = "after", ""
            return self._calls.tell(*call)
        first = self._text.find(END_CALL)
        return self._malformed(len(self._text) if first < 0 else first + len(END_CALL))

    def _malformed(self, length: int) -> list[Event]:
        text = self._opening + self._text[:length]
        self._state, self._text = "content", self._text[length:]
        return [Text(text)]


def _inside_string(text: str) -> bool:
    """Whether a JSON text ends within a string."""
    inside, position = False, 0
    while position < len(text):
        character = text[position]
        if character == "\\" and inside:
            position += 1
        elif character == '"':
            inside = not inside
        position += 1
    return inside


JSON = Syntax(call_in, _inside_string)


def _joined(events: list[Event]) -> list[Event]:
    """Neighbouring texts as one."""
    joined: list[Event] = []
    for event in events:
        if joined and isinstance(event, Text) and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined
