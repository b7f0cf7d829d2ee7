"""Tool calls and thoughts on the wire, as the official client reads them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from dflash_jax.engine.request import Marker
from dflash_jax.engine.template import pinned_template
from tests.server.conftest import Server

QUESTION = [{"role": "user", "content": "Weather?"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def tag(text: str) -> Marker:
    return Marker(0, text, hidden=True)


GEMMA_WORDS = (
    *(
        tag("<|channel>"),
        "thought\n",
        "Hm",
        ".\n",
        tag("<channel|>"),
        "Let me",
        " see.",
        tag("<|tool_call>"),
        "call:lo",
    ),
    *("ok{place:", tag('<|"|>'), "Zü", 'rich "x"', tag('<|"|>'), "}", tag("<tool_call|>")),
    *(tag("<|tool_call>"), "call:time{}", tag("<tool_call|>")),
)
QWEN_WORDS = (
    *("<think>", "\n", "Hm", ".", "\n</think>", "\n\n", "Let me see.", "\n", "<tool_call>", '\n{"name": "look", "argu'),
    *(
        'ments": {"place": "Zü',
        'rich \\"x\\""}}\n</tool',
        "_call>",
        "\n<tool_call>\n",
        '{"name": "time"}',
        "</tool_call>",
    ),
)


@pytest.fixture
def qwen3(goldens: Path) -> str:
    return (goldens / "templates" / "qwen3.jinja").read_text(encoding="utf-8")


@pytest.fixture(params=["gemma4", "qwen3"])
def calling(request: pytest.FixtureRequest, start: Callable[..., Server], qwen3: str) -> Server:
    """A model that thinks, speaks and calls two tools."""
    if request.param == "gemma4":
        return start(words=GEMMA_WORDS, chat_template=pinned_template("gemma4"))
    return start(words=QWEN_WORDS, chat_template=qwen3)


def test_calls_in_a_whole_answer(calling: Server) -> None:
    answer = calling.openai.chat.completions.create(model="any", messages=QUESTION, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.reasoning_content == "Hm."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name) == ("function", "look")
    assert json.loads(first.function.arguments) == {"place": 'Zürich "x"'}
    assert (second.function.name, second.function.arguments) == ("time", "{}")
    assert first.id.startswith("call_")
    assert first.id != second.id


def test_calls_in_a_stream(calling: Server) -> None:
    stream = calling.openai.chat.completions.create(model="any", messages=QUESTION, tools=TOOLS, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me see."
    assert "".join(getattr(choice.delta, "reasoning_content", "") for choice in choices) == "Hm."
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    parts = [part for choice in choices for part in choice.delta.tool_calls or ()]
    names = [(part.index, part.function.name) for part in parts if part.function.name]
    assert names == [(0, "look"), (1, "time")]
    assert all((part.id is None) == (part.function.name is None) for part in parts)
    arguments = ["".join(part.function.arguments for part in parts if part.index == index) for index in (0, 1)]
    assert [json.loads(text) for text in arguments] == [{"place": 'Zürich "x"'}, {}]


def test_openais_stream_helper_accumulates_calls(calling: Server) -> None:
    with calling.openai.chat.completions.stream(model="any", messages=QUESTION, tools=TOOLS) as stream:
        final = stream.get_final_completion()
    (choice,) = final.choices
    assert [call.function.name for call in choice.message.tool_calls] == ["look", "time"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"place": 'Zürich "x"'}


def test_the_message_can_be_sent_back(calling: Server) -> None:
    answer = calling.openai.chat.completions.create(model="any", messages=QUESTION, tools=TOOLS)
    message = answer.choices[0].message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    calling.openai.chat.completions.create(model="any", messages=[*QUESTION, message, result], tools=TOOLS)
    assert calling.engine.handles[-1].request.messages[1] == message


@pytest.mark.parametrize("extra", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_a_call_is_text(start: Callable[..., Server], qwen3: str, extra: dict) -> None:
    server = start(words=["<tool_call>", '{"name": "look"}', "</tool_call>"], chat_template=qwen3)
    answer = server.openai.chat.completions.create(model="any", messages=QUESTION, **extra)
    assert answer.choices[0].message.content == '<tool_call>{"name": "look"}</tool_call>'
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert server.engine.handles[0].request.tools is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_text(start: Callable[..., Server], qwen3: str, stream: bool) -> None:
    server = start(words=["Well ", "<tool_call>", '{"name": "look', '"}', "</tool_call>"], chat_template=qwen3)
    answer = server.openai.chat.completions.create(
        model="any", messages=QUESTION, tools=TOOLS, max_tokens=3, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    texts = [(c.choices[0].delta if stream else c.choices[0].message).content or "" for c in chunks]
    assert "".join(texts) == 'Well <tool_call>{"name": "look'
    assert chunks[-1].choices[0].finish_reason == "length"


def test_thoughts_that_the_prompt_opened(start: Callable[..., Server], qwen3: str) -> None:
    server = start(words=["Hm", "\n</think>", "\n\nHi"], chat_template=qwen3, prompt_end="assistant\n<think>\n")
    message = server.openai.chat.completions.create(model="any", messages=QUESTION).choices[0].message
    assert (message.content, message.reasoning_content) == ("Hi", "Hm")


def test_text_completions_are_left_alone(start: Callable[..., Server], qwen3: str) -> None:
    server = start(words=["<think>a</think>", "b"], chat_template=qwen3)
    assert server.openai.completions.create(model="any", prompt="x").choices[0].text == "<think>a</think>b"


def test_template_variables_reach_the_engine(server: Server) -> None:
    variables = {"enable_thinking": True, "reasoning_effort": "low", "budget": 3, "none": None}
    server.openai.chat.completions.create(
        model="any", messages=QUESTION, extra_body={"chat_template_kwargs": variables}
    )
    assert server.engine.handles[0].request.template_variables == variables


@pytest.mark.parametrize(
    "variables", [{"a": []}, {"a": {"b": 1}}, {"a": "x" * 257}, {str(n): n for n in range(17)}, [], "a"]
)
def test_template_variables_are_few_and_small(server: Server, variables: object) -> None:
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
        server.openai.chat.completions.create(
            model="any", messages=QUESTION, extra_body={"chat_template_kwargs": variables}
        )
    assert server.engine.handles == []


def test_an_answer_can_be_continued(server: Server) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "It"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    server.openai.chat.completions.create(model="any", messages=messages, extra_body=extra)
    server.openai.chat.completions.create(model="any", messages=messages)
    assert [handle.request.continue_final for handle in server.engine.handles] == [True, False]


@pytest.mark.parametrize(
    "extra", [{"add_generation_prompt": False}, {"add_generation_prompt": True, "continue_final_message": True}]
)
def test_a_prompt_for_nobody_is_refused(server: Server, extra: dict) -> None:
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt"):
        server.openai.chat.completions.create(model="any", messages=QUESTION, extra_body=extra)


TWO_TOOLS = [*TOOLS, {"type": "function", "function": {"name": "time"}}]
LOOK = {"type": "function", "function": {"name": "look"}}
FORCED = {
    "gemma4": ("call:look{", ("place:", tag('<|"|>'), "Rome", tag('<|"|>'), "}", tag("<tool_call|>"))),
    "qwen3": ('{"name": "look", "arguments":', (' {"place": "Rome"}}\n', "</tool_call>")),
}


@pytest.fixture(params=FORCED)
def forced(request: pytest.FixtureRequest, start: Callable[..., Server], qwen3: str) -> Server:
    """A model that goes on from the beginning of a call."""
    template = {"gemma4": pinned_template("gemma4"), "qwen3": qwen3}[request.param]
    return start(words=FORCED[request.param][1], chat_template=template)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("tools", "choice"), [(TOOLS, "required"), (TWO_TOOLS, LOOK)])
def test_a_call_that_must_be_is_begun_for_the_model(forced: Server, tools: list, choice: object, stream: bool) -> None:
    with (
        forced.openai.chat.completions.stream(model="any", messages=QUESTION, tools=tools, tool_choice=choice)
        if stream
        else contextlib.nullcontext() as events
    ):
        answer = (
            events.get_final_completion()
            if events
            else forced.openai.chat.completions.create(model="any", messages=QUESTION, tools=tools, tool_choice=choice)
        )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"place": "Rome"})
    assert not answer.choices[0].message.content
    begun = forced.engine.handles[-1].request.answer_start("")
    assert begun.endswith(next(text for text, words in FORCED.values() if words == forced.engine.words))


def test_a_call_of_any_tool_goes_on_from_before_its_name(start: Callable[..., Server], qwen3: str) -> None:
    server = start(words=["time", '"}', "\n</tool_call>"], chat_template=qwen3, prompt_end="<think>\n")
    answer = server.openai.chat.completions.create(
        model="any", messages=QUESTION, tools=TWO_TOOLS, tool_choice="required"
    )
    message = answer.choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["time"]
    assert not hasattr(message, "reasoning_content")
    begun = server.engine.handles[-1].request.answer_start
    assert begun("<think>\n") == '\n</think>\n\n<tool_call>\n{"name": "'
    assert begun("<|im_start|>assistant\n") == '<think>\n\n</think>\n\n<tool_call>\n{"name": "'
    assert begun("<think>\n\n</think>\n\n") == '<tool_call>\n{"name": "'


def test_a_begun_call_that_breaks_off_is_text(start: Callable[..., Server], qwen3: str) -> None:
    server = start(words=[' {"place', '": "Rome'], chat_template=qwen3)
    (choice,) = server.openai.chat.completions.create(
        model="any", messages=QUESTION, tools=TOOLS, tool_choice="required"
    ).choices
    assert choice.message.content == '<tool_call>\n{"name": "look", "arguments": {"place": "Rome'
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_nothing_is_begun_unless_asked_for(server: Server, choice: str | None) -> None:
    server.openai.chat.completions.create(
        model="any", messages=QUESTION, tools=TOOLS, extra_body={"tool_choice": choice}
    )
    assert server.engine.handles[-1].request.answer_start is None


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "required", "tools": []}, "there are no tools"),
        ({"tool_choice": LOOK}, "there are no tools"),
        ({"tool_choice": {**LOOK, "function": {"name": "go"}}, "tools": TOOLS}, "'go', which is not among the tools"),
        ({"tool_choice": "always", "tools": TOOLS}, "expected 'none', 'auto', 'required' or"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "expected 'none', 'auto', 'required' or"),
        ({"tool_choice": {"type": "function", "function": 3}, "tools": TOOLS}, "expected 'none', 'auto', 'required'"),
        (
            {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "<|im_end|>"}}]},
            "names may hold letters, digits",
        ),
        ({"tool_choice": "required", "tools": TOOLS, "continue_final_message": True}, "leave continue_final_message"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(
    start: Callable[..., Server], qwen3: str, extra: dict, found: str
) -> None:
    server = start(chat_template=qwen3)
    body = {"messages": [*QUESTION, {"role": "assistant", "content": ""}], **extra}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")
    assert found in answer.json()["error"]["message"]
    assert server.engine.handles == []


def test_a_model_whose_calls_are_unknown_cannot_be_made_to_call(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="how this model writes calls is unknown"):
        server.openai.chat.completions.create(model="any", messages=QUESTION, tools=TOOLS, tool_choice="required")


def test_schemas_of_tools_reach_the_parser(start: Callable[..., Server]) -> None:
    template = "{{ '<tool_call>\\n<function=' }}{{ '<parameter=' }}"
    words = ["<tool_call>\n<function=look>\n<parameter=days>\n3\n</para", "meter>\n</function>\n</tool_call>"]
    days = {"type": "object", "properties": {"days": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": days}}]
    server = start(words=words, chat_template=template)
    answer = server.openai.chat.completions.create(model="any", messages=QUESTION, tools=tools)
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"days": 3}'
