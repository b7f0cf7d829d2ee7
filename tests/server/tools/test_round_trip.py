"""What a family renders, its parser reads, however the answer is cut into pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_jax.engine.request import Marker
from dflash_jax.server.tools import Family, gemma4, hermes, llama3, plain, qwen3, qwen3_coder
from dflash_jax.server.tools.events import Call, Piece
from tests.server.tools.reading import Said, cut, read

pytestmark = pytest.mark.slow

CALLING = {"gemma4": gemma4, "hermes": hermes, "llama3": llama3, "qwen3": qwen3}
FAMILIES = {**CALLING, "qwen3_coder": qwen3_coder}
TAGS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", '<|"|>', "<|tool_call>", "<tool_call|>", "<|channel>"),
    *("<channel|>", '"', "'", "\\", "\n", "{", "}", "[", "]", ":", ",", ";", "\u00e9", "\U0001f642", "call:", '\\"'),
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12)
TEXTS = st.lists(st.sampled_from(TAGS) | ANY_TEXT, max_size=5).map("".join)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,10}", fullmatch=True)
CALLS = st.builds(Call, NAMES, st.dictionaries(TEXTS, VALUES, max_size=3))
CUTS = st.lists(st.integers(1, 7), max_size=200)


@pytest.mark.parametrize("name", CALLING)
@settings(deadline=None)
@given(calls=st.lists(CALLS, min_size=1, max_size=3), cuts=CUTS)
def test_calls_survive(name: str, calls: list[Call], cuts: list[int]) -> None:
    family = FAMILIES[name]
    assert read(family, cut(family.render(calls), cuts)) == Said("", "", calls)


@pytest.mark.parametrize("name", ["gemma4", "hermes", "qwen3"])
@settings(deadline=None)
@given(calls=st.lists(CALLS, min_size=1, max_size=2), cuts=CUTS)
def test_text_before_and_after_calls_survives(name: str, calls: list[Call], cuts: list[int]) -> None:
    family = FAMILIES[name]
    pieces = ["Let me < see.", *family.render(calls), "Done."]
    assert read(family, cut(pieces, cuts)) == Said("Let me < see.Done.", "", calls)


MARKERS = st.sampled_from(
    ["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<tool_call>", "</tool_call>", "<think>"]
).map(lambda text: Marker(0, text, False))
FRAGMENTS = st.sampled_from(
    [
        *(
            "call:f{a:",
            "}",
            '{"name": "f", "arguments": {',
            '"',
            "}}",
            "thought\n",
            "text",
            "<tool_call>",
            "</tool_call>",
        ),
        *("<function=f>", "<parameter=a>", "</parameter>", "</function>"),
    ]
)
ANSWERS = st.lists(MARKERS | FRAGMENTS | ANY_TEXT, max_size=12)


def schema_of(value: Any) -> dict[str, str]:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return {"type": kinds.get(type(value), "null")}


CODER_TEXTS = TEXTS.filter(lambda text: "</parameter>" not in text)
CODER_CALLS = st.builds(Call, NAMES, st.dictionaries(NAMES, VALUES | CODER_TEXTS, max_size=3))


@settings(deadline=None)
@given(calls=st.lists(CODER_CALLS, min_size=1, max_size=3, unique_by=lambda call: call.name), cuts=CUTS)
def test_calls_of_qwen_3_coder_survive(calls: list[Call], cuts: list[int]) -> None:
    """Values go by the types that the tools declare."""
    tools = {
        call.name: {"properties": {key: schema_of(value) for key, value in call.arguments.items()}} for call in calls
    }
    pieces = ["Let me < see.", *qwen3_coder.render(calls), "Done."]
    assert read(qwen3_coder, cut(pieces, cuts), tools=tools) == Said("Let me < see.Done.", "", calls)


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None)
@given(pieces=ANSWERS, cuts=CUTS)
def test_how_an_answer_is_cut_makes_no_difference(name: str, pieces: list[Piece], cuts: list[int]) -> None:
    family = FAMILIES[name]
    assert read(family, cut(pieces, cuts)) == read(family, pieces)


@pytest.mark.parametrize("family", [*FAMILIES.values(), plain])
@settings(deadline=None)
@given(pieces=ANSWERS)
def test_without_tools_there_are_no_calls(family: Family, pieces: list[Piece]) -> None:
    assert read(family, pieces, tools=None).calls == []


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None)
@given(words=st.lists(FRAGMENTS | ANY_TEXT, max_size=12), markers=st.lists(MARKERS, max_size=6))
def test_no_letter_is_lost_when_there_is_no_call(name: str, words: list[str], markers: list[Marker]) -> None:
    pieces: list[Piece] = [piece for pair in zip(words, [*markers, *[""] * 12], strict=False) for piece in pair]
    found = read(FAMILIES[name], [piece for piece in pieces if piece])
    if not found.calls:
        letters = "".join(piece for piece in words)
        for dropped in ("<think>", "</think>", "thought\n"):
            letters = letters.replace(dropped, "")
        everything = found.reasoning + found.text
        assert all(everything.count(c) >= letters.count(c) for c in set(letters) if not c.isspace())
