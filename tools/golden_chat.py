"""Write tests/goldens/chat.json: conversations as transformers renders them.

Needs transformers and gguf, which the project itself does not use for this:

    python tools/golden_chat.py SmolLM2-135M-Instruct.Q4_1.gguf

"send" is what a client sends in OpenAI's form, "given" what transformers was given, where the two differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"

SYSTEM = {"role": "system", "content": "Answer in one word.\n"}
QUESTION = {"role": "user", "content": "  What is the capital of <France> & why? \u00e9\u4f60\U0001f642\n"}
ANSWER = {"role": "assistant", "content": "Paris"}
THANKS = {"role": "user", "content": "Thanks"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather\'s state at "place" <now> \u00e9',
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def called(arguments: Any, content: str | None = "") -> dict[str, Any]:
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "weather", "arguments": arguments}} for n in (1, 2)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


RESULTS = [
    {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain, 12 \u00b0C"},
    {"role": "tool", "tool_call_id": "call_2", "name": "weather", "content": '{"sky": "blue"}\n'},
]
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nParis"}
ARGUMENTS = {"place": "Z\u00fcrich", "days": [1, 2.5, None, True]}

CASES: list[dict[str, Any]] = [
    {"template": "smollm2", "send": [QUESTION]},
    {"template": "smollm2", "send": [SYSTEM, QUESTION, ANSWER, THANKS]},
    {"template": "smollm2", "send": [SYSTEM, QUESTION, ANSWER], "add_generation_prompt": False},
    {
        "template": "smollm2",
        "send": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "given": [{"role": "user", "content": "a\nb"}],
    },
    {
        "template": "smollm2",
        "send": [{"role": "developer", "content": "Be brief"}, QUESTION],
        "given": [{"role": "system", "content": "Be brief"}, QUESTION],
    },
    {"template": "qwen3_style", "send": [QUESTION]},
    {"template": "qwen3_style", "send": [QUESTION], "variables": {"enable_thinking": False}},
    {"template": "qwen3_style", "send": [SYSTEM, QUESTION, THOUGHT, THANKS], "tools": [WEATHER]},
    {"template": "qwen3_style", "send": [QUESTION, THOUGHT], "add_generation_prompt": False},
    {
        "template": "qwen3_style",
        "send": [QUESTION, {"role": "assistant", "content": "Paris", "reasoning": "thinks"}],
        "add_generation_prompt": False,
    },
    {
        "template": "qwen3_style",
        "send": [SYSTEM, QUESTION, called(json.dumps(ARGUMENTS), None), *RESULTS],
        "given": [SYSTEM, QUESTION, called(ARGUMENTS), *RESULTS],
        "tools": [WEATHER, WEATHER],
    },
    {"template": "qwen3_style", "send": [QUESTION, called("{not json", "Let me see."), *RESULTS, ANSWER, THANKS]},
    {"template": "gemma_style", "send": [QUESTION]},
    {"template": "gemma_style", "send": [SYSTEM, QUESTION, ANSWER, THANKS]},
    {"template": "gemma_style", "send": [QUESTION, ANSWER], "add_generation_prompt": False},
]


def smollm2_template(path: str) -> str:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.chat_template")
    if field is None:
        raise SystemExit(f"{path} holds no chat template")
    return field.contents()


def main(gguf_path: str) -> None:
    import tokenizers
    import transformers

    templates = {file.stem: file.read_text() for file in sorted((GOLDENS / "templates").glob("*.jinja"))}
    templates["smollm2"] = smollm2_template(gguf_path)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    renderer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<|im_end|>")
    for case in CASES:
        case["text"] = renderer.apply_chat_template(
            case.get("given", case["send"]),
            tools=case.get("tools"),
            chat_template=templates[case["template"]],
            add_generation_prompt=case.get("add_generation_prompt", True),
            tokenize=False,
            **case.get("variables", {}),
        )
    golden = {
        "command": "python tools/golden_chat.py SmolLM2-135M-Instruct.Q4_1.gguf",
        "versions": {"transformers": transformers.__version__},
        "bos": "<bos>",
        "eos": "<|im_end|>",
        "smollm2": templates["smollm2"],
        "cases": CASES,
    }
    (GOLDENS / "chat.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: golden_chat.py SMOLLM2.gguf")
    main(sys.argv[1])
