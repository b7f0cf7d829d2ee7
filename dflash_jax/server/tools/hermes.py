"""Qwen2.5 and Hermes: calls as JSON in <tool_call> tags."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_jax.server.tools.events import Call, Parser, Piece
from dflash_jax.server.tools.tagged import TaggedParser, render_tagged


def parser(prompt_end: str = "", tools: bool = True) -> Parser:
    """A parser for one answer."""
    del prompt_end
    return TaggedParser(thinks=False, thinking=False, tools=tools)


def render(calls: Sequence[Call]) -> list[Piece]:
    """Calls as the model writes them."""
    return render_tagged(calls)
