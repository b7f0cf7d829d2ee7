"""Tool calls and thoughts in a model's answers: one file per family, each with the same three functions.

    parser(prompt_end, tools) -> Parser           reads an answer as it comes
    render(calls) -> list of pieces               writes calls as the model writes them
    opening(name, prompt_end) -> list of pieces   how an answer begins that must be a call

`family_of` picks the file by what the model's chat template writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dflash_jax.server.tools import gemma4, hermes, llama3, plain, qwen3, qwen3_coder
from dflash_jax.server.tools.events import Call, Parser, Piece, Tools


class Family(Protocol):
    """One of the files."""

    @staticmethod
    def parser(prompt_end: str = "", tools: Tools | None = None) -> Parser:
        """A parser for one answer that goes on from `prompt_end`; if `tools` is None a call is text like any other."""
        ...

    @staticmethod
    def render(calls: Sequence[Call]) -> list[Piece]:
        """What the model would write to make these calls."""
        ...

    @staticmethod
    def opening(name: str | None, prompt_end: str = "") -> list[Piece]:
        """What goes between `prompt_end` and a call's name, or its arguments if the name is given.

        The name must be a word. Nothing for a family without calls.
        """
        ...


_MARKS: tuple[tuple[tuple[str, ...], Family], ...] = (
    (("<|tool_call>",), gemma4),
    (("<tool_call>", "<function=", "<parameter="), qwen3_coder),
    (("</think>",), qwen3),
    (("<tool_call>",), hermes),
    (("<|start_header_id|>", '"parameters": '), llama3),
)
"""Strings that all stand in the templates of a family; the first line that fits counts."""


def family_of(template: str | None) -> Family:
    """The family whose calls a chat template writes; `plain` if it writes none that are known."""
    for strings, family in _MARKS:
        if template and all(string in template for string in strings):
            return family
    return plain
