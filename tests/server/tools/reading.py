"""Helpers of the parser tests: events back to what they tell of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence

from dflash_jax.engine.request import Marker
from dflash_jax.server.tools import Family
from dflash_jax.server.tools.events import (
    Call,
    CallArguments,
    CallFinished,
    CallStarted,
    Event,
    Piece,
    Reasoning,
    Text,
    Tools,
)

NO_SCHEMAS: Tools = {}


@dataclasses.dataclass
class Said:
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = dataclasses.field(default_factory=list)


def said(events: Iterable[Event]) -> Said:
    """What an answer says; every call is told of in order and completely."""
    found, name, arguments = Said(), None, ""
    for event in events:
        match event:
            case Text(text):
                assert text
                assert name is None
                found.text += text
            case Reasoning(text):
                assert text
                found.reasoning += text
            case CallStarted(index, started):
                assert index == len(found.calls)
                assert name is None
                name, arguments = started, ""
            case CallArguments(index, text):
                assert index == len(found.calls)
                arguments += text
            case CallFinished(index):
                assert index == len(found.calls)
                assert name is not None
                found.calls.append(Call(name, json.loads(arguments)))
                name = None
    assert name is None
    return found


def read(family: Family, pieces: Sequence[Piece] | str, prompt_end: str = "", tools: Tools | None = NO_SCHEMAS) -> Said:
    """An answer that comes piece by piece."""
    parser = family.parser(prompt_end, tools)
    events = [event for piece in pieces for event in parser.feed([piece])]
    return said([*events, *parser.finish()])


def cut(pieces: Sequence[Piece], places: Iterable[int]) -> list[Piece]:
    """The same pieces with texts cut into shorter ones: each place is the length of the next."""
    found: list[Piece] = []
    lengths = iter(places)
    for piece in pieces:
        while isinstance(piece, str) and (length := next(lengths, 0)) and length < len(piece):
            found.append(piece[:length])
            piece = piece[length:]
        found.append(piece)
    return found


def marked(text: str, tags: Sequence[str], *, hidden: bool = False) -> list[Piece]:
    """A text in which tags are tokens of their own."""
    pieces: list[Piece] = [text]
    for tag in tags:
        pieces = [
            part
            for piece in pieces
            for part in (_split(piece, tag, hidden) if isinstance(piece, str) else [piece])
            if part
        ]
    return pieces


def _split(text: str, tag: str, hidden: bool) -> list[Piece]:
    first, *rest = text.split(tag)
    return [first, *(piece for part in rest for piece in (Marker(0, tag, hidden), part))]
