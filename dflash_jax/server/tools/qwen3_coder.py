"""Qwen3-Coder and Qwen3.5: thoughts in <think> tags, calls as tags in tags, with values as they are.

    <tool_call>
    <function=look>
    <parameter=place>
    Rome
    </parameter>
    </function>
    </tool_call>

A value does not tell its type: the tool's schema does, and a value without one is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from dflash_jax.server.tools.events import Call, Parser, Piece, Tools, dump
from dflash_jax.server.tools.tagged import Syntax, TaggedParser, end_of_thought, in_thought, open_tagged, render_tagged

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>")
_END_PARAMETER = re.compile(r"</parameter>(?=\s*(?:<parameter=|</function>))")
_END_FUNCTION = re.compile(r"\s*</function>\s*")
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
"""What these models' templates write for JSON's own."""
_KIND_OF: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
"""What a schema calls the type of a value."""


def parser(prompt_end: str = "", tools: Tools | None = None) -> Parser:
    """A parser for one answer; some templates open the thoughts at the end of the prompt."""
    schemas = tools or {}
    syntax = Syntax(lambda text: _call(text, schemas), _inside)
    return TaggedParser(syntax, thinks=True, thinking=in_thought(prompt_end), tools=tools is not None)


def render(calls: Sequence[Call]) -> list[Piece]:
    """Calls as the model writes them."""
    return render_tagged(_render(call) for call in calls)


def opening(name: str | None, prompt_end: str = "") -> list[Piece]:
    """The beginning of a call, after the end of thoughts that the prompt opened."""
    return open_tagged("<function=" if name is None else f"<function={name}>\n", end_of_thought(prompt_end))


def _render(call: Call) -> str:
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in call.arguments.items()}
    parameters = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<function={call.name}>\n{''.join(parameters)}</function>"


def _call(text: str, tools: Tools) -> tuple[str, str] | None:
    name, values, rest = _split(text)
    if not name or not _END_FUNCTION.fullmatch(rest):
        return None
    properties = tools.get(name, {}).get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    try:
        return name, dump({key: _typed(value, known.get(key)) for key, value in values})
    except (ValueError, RecursionError):
        return None


def _inside(text: str) -> bool:
    name, _, rest = _split(text)
    return bool(name) and _PARAMETER.match(rest) is not None


def _split(text: str) -> tuple[str, list[tuple[str, str]], str]:
    """The name, keys and values that are complete, and the rest of the text."""
    function = _FUNCTION.match(text)
    if function is None:
        return "", [], text
    place, values = function.end(), []
    while parameter := _PARAMETER.match(text, place):
        end = _END_PARAMETER.search(text, parameter.end())
        if end is None:
            break
        value = text[parameter.end() : end.start()]
        values.append((parameter[1].strip(), value.removeprefix("\n").removesuffix("\n")))
        place = end.end()
    return function[1].strip(), values, text[place:]


def _typed(text: str, schema: Any) -> Any:
    """A value as its schema wants it; the text that it is where that does not work."""
    kinds = set(_kinds(schema))
    word = _CONSTANTS.get(text.strip(), text.strip())
    if "null" in kinds and word == "null":
        return None
    if not kinds or "string" in kinds:
        return text
    try:
        return json.loads(word, parse_constant=_refuse, strict=False)
    except (ValueError, RecursionError):
        return text


def _kinds(schema: Any) -> Iterable[str]:
    """The types that a schema names, also in its alternatives; one that stands elsewhere is taken for an object.

    A schema without a type has those of the values that it lists.
    """
    if not isinstance(schema, Mapping):
        return
    named = schema.get("type")
    if named is None:
        listed = schema.get("enum")
        values = [*(listed if isinstance(listed, list) else []), *([schema["const"]] if "const" in schema else [])]
        named = [_KIND_OF[type(value)] for value in values if type(value) in _KIND_OF]
    yield from (kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str))
    for alternatives in (schema.get("anyOf"), schema.get("oneOf")):
        for alternative in alternatives if isinstance(alternatives, list) else []:
            yield from _kinds(alternative)
    if "$ref" in schema or "allOf" in schema:
        yield "object"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")
