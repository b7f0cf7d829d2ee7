"""Write tests/goldens/chat.json: conversations as transformers renders them, in the templates of all families.

Needs transformers and gguf, which the project itself does not use for this:

    python tools/golden_chat.py SmolLM2-135M-Instruct.Q4_1.gguf

Every conversation is rendered in every template. "send" is what a client sends in OpenAI's form; transformers is given
`as_transformers_wants(send)`. Where a template refuses a conversation, "texts" has null.

    python tools/golden_chat.py --check TEMPLATE.jinja...

compares instead of writing, for templates that are not in the repository: prints equal/all per template.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
PINNED = ROOT / "dflash_jax" / "engine" / "templates"
BOS, EOS = "<bos>", "<eos>"

SYSTEM = {"role": "system", "content": "Answer in one word.\n"}
QUESTION = {"role": "user", "content": "  What is the capital of <France> & why? \u00e9\u4f60\U0001f642\n"}
ANSWER = {"role": "assistant", "content": "Paris"}
THANKS = {"role": "user", "content": "Thanks"}
THOUGHT = {"role": "assistant", "content": "Paris\n", "reasoning_content": "A city.\nIn France?"}
THINKS_ALOUD = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nParis"}
CHANNEL = {"role": "assistant", "content": "<|channel>thought\nhm\n<channel|>Paris"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather\'s state at "place" <now> \u00e9',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A city", "enum": ["Z\u00fcrich", "Bern"]},
                "days": {"type": "array", "items": {"type": "integer"}, "description": "From today"},
                "options": {
                    "type": "object",
                    "properties": {"metric": {"type": "boolean", "nullable": True}, "Level": {"type": "number"}},
                    "required": ["metric"],
                },
            },
            "required": ["place"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "Now", "parameters": {}}}
ARGUMENTS = {"place": "Z\u00fcrich \"a\" 'b'\n", "days": [1, 2.5, None, True], "Options": {"b": "", "a": -3}}


def call(number: int, arguments: str, name: str = "weather") -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": content}


ONE_CALL = {"role": "assistant", "content": None, "tool_calls": [call(1, json.dumps(ARGUMENTS))]}
TWO_CALLS = {
    "role": "assistant",
    "content": "Let me see.",
    "reasoning_content": "Two tools.",
    "tool_calls": [call(1, json.dumps(ARGUMENTS)), call(2, "{}", "time")],
}
TOOLS = {"tools": [WEATHER, TIME]}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "question": {"send": [QUESTION]},
    "system": {"send": [SYSTEM, QUESTION, ANSWER, THANKS]},
    "no generation prompt": {"send": [SYSTEM, QUESTION, ANSWER], "add_generation_prompt": False},
    "thinking on": {"send": [SYSTEM, QUESTION], "variables": {"enable_thinking": True}},
    "thinking off": {"send": [QUESTION], "variables": {"enable_thinking": False}},
    "old thoughts": {"send": [QUESTION, THOUGHT, THANKS]},
    "last thoughts": {"send": [QUESTION, THOUGHT], "add_generation_prompt": False},
    "thoughts as text": {"send": [QUESTION, THINKS_ALOUD, THANKS, CHANNEL, THANKS]},
    "continue": {"send": [QUESTION, {"role": "assistant", "content": "Par"}], "continue": True},
    "continue after a space": {
        "send": [SYSTEM, QUESTION, {"role": "assistant", "content": "It is "}],
        "continue": True,
    },
    "empty content": {"send": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, THANKS]},
    "parts": {"send": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    "tools": {"send": [QUESTION], **TOOLS},
    "tools and system": {"send": [SYSTEM, QUESTION], **TOOLS, "variables": {"enable_thinking": True}},
    "one call": {"send": [QUESTION, ONE_CALL, result(1, "rain, 12 \u00b0C")], **TOOLS},
    "one call, answered": {"send": [QUESTION, ONE_CALL, result(1, "rain"), ANSWER, THANKS], **TOOLS},
    "call without result": {"send": [QUESTION, ONE_CALL], **TOOLS, "add_generation_prompt": False},
    "two calls": {"send": [SYSTEM, QUESTION, TWO_CALLS, result(1, '{"sky": "blue"}\n'), result(2, "")], **TOOLS},
    "calls in a row": {"send": [QUESTION, ONE_CALL, result(1, "a"), TWO_CALLS, result(1, "b"), result(2, "c")]},
}


def as_transformers_wants(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Contents are strings, arguments objects."""
    given = []
    for message in messages:
        content = message["content"] or ""
        if not isinstance(content, str):
            content = "\n".join(part["text"] for part in content)
        given.append({**message, "content": content})
        if "tool_calls" in message:
            given[-1]["tool_calls"] = [
                {**c, "function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}}
                for c in message["tool_calls"]
            ]
    return given


def rendered(renderer: Any, template: str, conversation: dict[str, Any]) -> str | None:
    """What transformers makes of a conversation; None when the template refuses it."""
    import jinja2

    continues = conversation.get("continue", False)
    try:
        return renderer.apply_chat_template(
            as_transformers_wants(conversation["send"]),
            tools=conversation.get("tools"),
            chat_template=template,
            add_generation_prompt=conversation.get("add_generation_prompt", True) and not continues,
            continue_final_message=continues,
            tokenize=False,
            **conversation.get("variables", {}),
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def transformers_renderer() -> Any:
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def smollm2_template(path: str) -> str:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.chat_template")
    if field is None:
        raise SystemExit(f"{path} holds no chat template")
    return field.contents()


def write(gguf_path: str) -> None:
    import transformers

    renderer = transformers_renderer()
    files = sorted([*(GOLDENS / "templates").glob("*.jinja"), *PINNED.glob("*.jinja")])
    templates = {"smollm2": smollm2_template(gguf_path)}
    templates |= {file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8") for file in files}
    golden = {
        "command": "python tools/golden_chat.py SmolLM2-135M-Instruct.Q4_1.gguf",
        "versions": {"transformers": transformers.__version__},
        "bos": BOS,
        "eos": EOS,
        "smollm2": templates["smollm2"],
        "conversations": CONVERSATIONS,
        "texts": {
            name: {title: rendered(renderer, template, case) for title, case in CONVERSATIONS.items()}
            for name, template in templates.items()
        },
    }
    (GOLDENS / "chat.json").write_text(json.dumps(golden, indent=1) + "\n")


def check(paths: list[str]) -> None:
    from dflash_jax.engine.chat import render_text
    from dflash_jax.engine.request import RequestError
    from dflash_jax.engine.template import ChatTemplate

    renderer = transformers_renderer()
    for path in paths:
        source = Path(path).read_text(encoding="utf-8")
        template = ChatTemplate(source, bos=BOS, eos=EOS)
        equal, refused, other = 0, 0, []
        for title, case in CONVERSATIONS.items():
            expected = rendered(renderer, source, case)
            try:
                found = render_text(
                    template,
                    case["send"],
                    case.get("tools"),
                    case.get("add_generation_prompt", True),
                    case.get("variables"),
                    case.get("continue", False),
                )
            except RequestError:
                found = None
            equal += found == expected
            refused += expected is None
            other += [title] if found != expected else []
        print(f"{Path(path).name}: {equal}/{len(CONVERSATIONS)} equal ({refused} refused by both)", *other, sep="; ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"] and len(sys.argv) > 2:
        check(sys.argv[2:])
    elif len(sys.argv) == 2:
        write(sys.argv[1])
    else:
        raise SystemExit("usage: golden_chat.py SMOLLM2.gguf | --check TEMPLATE.jinja...")
