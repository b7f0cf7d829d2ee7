"""What parsers of answers read and what they say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from dflash_jax.engine.request import Marker
from dflash_jax.engine.tokenizer import replace_lone_surrogates

Piece = str | Marker
"""A piece of an answer: text, or a token of markup."""


Tools = Mapping[str, Mapping[str, Any]]
"""The tools that a model may call: the JSON schema of the arguments by the tool's name."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text of the answer proper."""

    text: str


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """Text of the model's thoughts."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallStarted:
    """The call number `index` of this answer, counted from 0, is one of the tool `name`."""

    index: int
    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """The next characters of a call's arguments, which are a JSON object when all have come."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class CallFinished:
    """A call is complete."""

    index: int


Event = Text | Reasoning | CallStarted | CallArguments | CallFinished


class Parser(Protocol):
    """Reads one answer. A call is told of when it is complete and sound; one that is not comes out as text."""

    def feed(self, pieces: Iterable[Piece]) -> list[Event]:
        """What is certain after these pieces. How the answer is cut into pieces of text makes no difference."""
        ...

    def finish(self) -> list[Event]:
        """The rest, when the answer has ended."""
        ...


class CallCounter:
    """Numbers the calls of an answer and tells of each in three events."""

    def __init__(self) -> None:
        self.count = 0

    def tell(self, name: str, arguments: str) -> list[Event]:
        """The events of a call with these arguments, as JSON."""
        index = self.count
        self.count += 1
        return [CallStarted(index, name), CallArguments(index, arguments), CallFinished(index)]


def dump(arguments: Mapping[str, Any]) -> str:
    """Arguments as JSON. Raises ValueError for NaN and infinities, which JSON does not have."""
    return replace_lone_surrogates(json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def held_back(text: str, tag: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    longest = min(len(tag) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if tag.startswith(text[-n:])), 0)


def spell(piece: Piece, tags: Iterable[str] = ()) -> str:
    """A piece as text: hidden tokens are left out unless they are among the tags."""
    if isinstance(piece, str):
        return piece
    return "" if piece.hidden and piece.text not in tags else piece.text


def spelled(pieces: Iterable[Piece]) -> str:
    """Pieces as the model's vocabulary spells them, hidden tokens too."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)
