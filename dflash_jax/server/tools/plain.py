"""Models without a syntax for tool calls that we know: everything is text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dflash_jax.server.tools.events import Call, Event, Parser, Piece, Text, Tools, spell


def parser(prompt_end: str = "", tools: Tools | None = None) -> Parser:
    """A parser that finds nothing."""
    del prompt_end, tools
    return _Parser()


def render(calls: Sequence[Call]) -> list[Piece]:
    """Nothing: such a model makes no calls."""
    del calls
    return []


def opening(name: str | None, prompt_end: str = "") -> list[Piece]:
    """Nothing."""
    del name, prompt_end
    return []


class _Parser:
    def feed(self, pieces: Iterable[Piece]) -> list[Event]:
        text = "".join(spell(piece) for piece in pieces)
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []
