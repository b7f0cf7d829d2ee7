"""Conversations are rendered as transformers renders them (tools/golden_chat.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dflash_jax.engine.chat import render_text
from dflash_jax.engine.request import RequestError
from dflash_jax.engine.template import ChatTemplate, pinned_template

TEMPLATES = ("smollm2", "qwen2.5", "qwen3", "qwen3_style", "gemma_style", "gemma4")


def source(name: str, goldens: Path, golden: dict[str, Any]) -> str | None:
    if name == "smollm2":
        return golden["smollm2"]
    pinned = pinned_template(name)
    return (goldens / "templates" / f"{name}.jinja").read_text(encoding="utf-8") if pinned is None else pinned


@pytest.fixture(scope="module")
def golden(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "chat.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_transformers_renders_them(
    name: str, goldens: Path, golden: dict[str, Any]
) -> None:
    template = ChatTemplate(source(name, goldens, golden), bos=golden["bos"], eos=golden["eos"])
    found = {}
    for title, case in golden["conversations"].items():
        settings = {
            "add_generation_prompt": case.get("add_generation_prompt", True),
            "variables": case.get("variables"),
            "continue_final": case.get("continue", False),
        }
        try:
            found[title] = render_text(template, case["send"], case.get("tools"), **settings)
        except RequestError:
            found[title] = None
    assert len(found) >= 19
    assert found == golden["texts"][name]


def test_every_golden_is_looked_at(golden: dict[str, Any]) -> None:
    assert set(golden["texts"]) == set(TEMPLATES)


QUESTION = {"role": "user", "content": "hi"}


def gemma4(messages: list[dict[str, Any]], **variables: Any) -> str:
    return render_text(ChatTemplate(pinned_template("gemma4"), bos="<bos>"), messages, variables=variables)


def test_gemma_4_thinks_when_it_is_told_to() -> None:
    off = "<bos><|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    assert gemma4([QUESTION]) == gemma4([QUESTION], enable_thinking=False) == off
    on = "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"
    assert gemma4([QUESTION], enable_thinking=True) == on


def test_no_other_family_has_a_template_of_its_own() -> None:
    assert pinned_template("llama") is None


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "eos_token", "add_generation_prompt"])
def test_the_conversations_own_variables_cannot_be_set(name: str) -> None:
    with pytest.raises(RequestError, match=f"chat_template_kwargs.{name}"):
        render_text(ChatTemplate("{{ bos_token }}"), [QUESTION], variables={name: []})


def test_only_the_assistant_is_continued() -> None:
    with pytest.raises(RequestError, match="assistant"):
        render_text(ChatTemplate("{{ messages[0].content }}"), [QUESTION], continue_final=True)


def test_a_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="leaves out"):
        render_text(ChatTemplate("nothing"), [QUESTION, {"role": "assistant", "content": "a"}], continue_final=True)
