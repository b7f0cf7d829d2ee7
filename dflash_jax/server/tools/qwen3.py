"""Qwen3: thoughts in <think> tags before the answer, calls as JSON in <tool_call> tags."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_jax.server.tools.events import Call, Parser, Piece
from dflash_jax.server.tools.tagged import THINK, TaggedParser, render_tagged


def parser(prompt_end: str = "", tools: bool = True) -> Parser:
    """A parser for one answer; some templates open the thoughts at the end of the prompt."""
    return TaggedParser(thinks=True, thinking=prompt_end.rstrip().endswith(THINK), tools=tools)


def render(calls: Sequence[Call]) -> list[Piece]:
    """Calls as the model writes them."""
    return render_tagged(calls)
