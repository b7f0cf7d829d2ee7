"""Models without a syntax for tool calls that we know: everything is text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dflash_jax.server.tools.events import Call, Event, Parser, Piece, Text, spell


def parser(prompt_end: str = "", tools: bool = True) -> Parser:
    """A parser that finds nothing."""
    del prompt_end, tools
    return _Parser()


def render(calls: Sequence[Call]) -> list[Piece]:
    """Nothing: such a model makes no calls."""
    del calls
    return []


class _Parser:
    def feed(self, pieces: Iterable[Piece]) -> list[Event]:
        text = "".join(spell(piece) for piece in pieces)
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []
