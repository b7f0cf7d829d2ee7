"""Qwen3: thoughts in <think> tags before the answer, calls as JSON in <tool_call> tags."""

from __future__ import annotations

from collections.abc import Sequence

from dflash_jax.server.tools.events import Call, Parser, Piece, Tools
from dflash_jax.server.tools.tagged import (
    END_THINK,
    JSON,
    THINK,
    TaggedParser,
    end_of_thought,
    in_thought,
    open_json,
    render_json,
)


def parser(prompt_end: str = "", tools: Tools | None = None) -> Parser:
    """A parser for one answer; some templates open the thoughts at the end of the prompt."""
    return TaggedParser(JSON, thinks=True, thinking=in_thought(prompt_end), tools=tools is not None)


def render(calls: Sequence[Call]) -> list[Piece]:
    """Calls as the model writes them."""
    return render_json(calls)


def opening(name: str | None, prompt_end: str = "") -> list[Piece]:
    """The beginning of a call, after the empty thoughts with which the model does not think."""
    done = prompt_end.rstrip().endswith(END_THINK)
    return open_json(name, "" if done else end_of_thought(prompt_end) or f"{THINK}\n\n{END_THINK}\n\n")
