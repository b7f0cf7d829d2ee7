"""Qwen2.5 and Hermes: calls as JSON in <tool_call> tags."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_jax.server.tools.events import Call, Parser, Piece, Tools
from dflash_jax.server.tools.tagged import JSON, TaggedParser, open_json, render_json


def parser(prompt_end: str = "", tools: Tools | None = None) -> Parser:
    """A parser for one answer."""
    del prompt_end
    return TaggedParser(JSON, thinks=False, thinking=False, tools=tools is not None)


def render(calls: Sequence[Call]) -> list[Piece]:
    """Calls as the model writes them."""
    return render_json(calls)


def opening(name: str | None, prompt_end: str = "") -> list[Piece]:
    """The beginning of a call."""
    del prompt_end
    return open_json(name)
