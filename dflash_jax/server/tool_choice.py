"""What a request says about tools: which there are, and whether the answer must be a call of one.

A call that must be is begun for the model: the answer starts with what its family writes before the call's name, or
before its arguments when the name is certain, and the model goes on from there. What it then writes is its own, so that
it may still break the call off, or name a tool that does not exist where several are offered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dflash_jax.server.bodies import ChatBody
from dflash_jax.server.errors import ApiError
from dflash_jax.server.tools import Family
from dflash_jax.server.tools.events import Piece, Tools, spelled

_CHOICES = ("none", "auto", "required")
_WORD = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
"""Names that cannot be taken for markup."""


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """The tools that are offered, and what is forced on the answer."""

    family: Family
    tools: list[dict[str, Any]] | None
    forced: bool = False
    name: str | None = None
    """The one tool that a forced call can be of."""

    @property
    def schemas(self) -> Tools | None:
        """What the parser of the answer must know of the tools; None without any."""
        return dict(_named(tool) for tool in self.tools) if self.tools else None

    def opening(self, prompt_end: str) -> list[Piece]:
        """What the answer starts with."""
        return self.family.opening(self.name, prompt_end) if self.forced else []

    def opening_text(self, prompt_end: str) -> str:
        """The same as text."""
        return spelled(self.opening(prompt_end))


def read_choice(body: ChatBody, family: Family) -> ToolChoice:
    """The choice of a body. Raises ApiError for one that is unknown, contradictory or beyond the model."""
    wanted = _wanted_name(body.tool_choice)
    tools = None if body.tool_choice == "none" else body.tools or None
    if body.tool_choice in (None, "none", "auto"):
        return ToolChoice(family, tools)
    if not tools:
        raise _refusal("asks for a call but there are no tools: send `tools` too")
    names = [_named(tool)[0] for tool in tools]
    if wanted is not None and wanted not in names:
        raise _refusal(f"names the function {wanted[:80]!r}, which is not among the tools")
    if body.continue_final_message:
        raise _refusal("asks for a call, which cannot go on from the last message: leave continue_final_message out")
    if not family.opening(None):
        raise _refusal("asks for a call, but how this model writes calls is unknown: leave it out or take 'auto'")
    name = names[0] if wanted is None and len(names) == 1 else wanted
    if name is not None and not _WORD.fullmatch(name):
        raise _refusal(f"asks for a call of {name[:80]!r}; names may hold letters, digits and _ . : / - only")
    return ToolChoice(family, tools, True, name)


def _wanted_name(choice: str | dict[str, Any] | None) -> str | None:
    """The name of the function that a choice names."""
    if choice is None or (isinstance(choice, str) and choice in _CHOICES):
        return None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        known = ", ".join(map(repr, _CHOICES))
        raise _refusal(f'is not supported: expected {known} or {{"type": "function", "function": {{"name": ...}}}}')
    return name


def _named(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and schema of a tool, as far as it has them: what is wrong with tools is for the template to say."""
    function = tool.get("function")
    fields = function if isinstance(function, dict) else tool
    parameters = fields.get("parameters")
    return str(fields.get("name", "")), parameters if isinstance(parameters, dict) else {}


def _refusal(reason: str) -> ApiError:
    return ApiError(400, f"tool_choice {reason}", param="tool_choice")
