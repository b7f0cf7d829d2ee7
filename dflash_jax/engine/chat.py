"""Messages to a Prompt: rendered, tokenised, every token labelled with who said it, nobody able to forge
a special token.

Two kinds of noncharacters (stripped from what clients send) travel through the template with the text. A GUARD inside
a special token's string keeps the tokenizer from recognising it. In a second rendering every message's content stands
between an opening and a closing mark that name the message, which shows where the template put it; that rendering
counts only if it is otherwise identical to the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dflash_jax.compress.spans import Kind, Prompt, Span, spans_from_labels
from dflash_jax.engine.request import RequestError
from dflash_jax.engine.template import ChatTemplate
from dflash_jax.engine.tokenizer import GUARD, Tokenizer, is_markup, replace_lone_surrogates

ROLES = ("system", "developer", "user", "assistant", "tool")

_OPEN, _CLOSE, _DIGIT_ZERO = "\ufdd1", "\ufdd2", 0xFDE0
_MARK = re.compile("([\ufdd1\ufdd2])([\ufde0-\ufde9]+)")
_END = "\ufdd3 "
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
_NEVER = re.compile("(?!)")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def build_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    continue_final: bool = False,
) -> Prompt:
    """Token ids and spans of a conversation in OpenAI's form.

    Without special-token strings in what the client sent, the ids are those of the whole rendered text. With them, the
    strings are tokenised as plain text. In user and tool messages this holds as well for added tokens in brackets that
    the template itself writes, such as <tool_call>. (A special token of one single character cannot be told from text.)
    Content that the template changes or leaves out is structure. With `continue_final` the text ends with the last
    message's content, for the model to go on from there. Raises RequestError.
    """
    normal = _for_template(template, messages, continue_final)
    special, markup = _control_strings(tokenizer, template)
    guarded = [_guard_message(message, special, markup) for message in normal]
    guarded_tools = [_map_strings(_clean(tool), _guard(markup)) for tool in tools or ()]

    def render(conversation: list[dict[str, Any]]) -> str:
        return _render(template, conversation, guarded_tools, add_generation_prompt, variables, continue_final)

    base = render(guarded)
    ids, offsets, text = tokenizer.encode_guarded(base)
    try:
        ranges = _content_ranges(base, render([_mark(m, index) for index, m in enumerate(guarded)]))
    except RequestError:  # the template reads the content so closely that marks upset it: then all is structure
        ranges = {}
    contents = {
        index: range_ for index, range_ in ranges.items() if text[slice(*range_)] == normal[index]["content"].strip()
    }
    return Prompt(ids, spans_from_labels(_labels(offsets, contents), {i: messages[i]["role"] for i in contents}))


def render_text(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    continue_final: bool = False,
) -> str:
    """The text of a conversation in OpenAI's form; arguments as `build_prompt`. Raises RequestError."""
    normal = _for_template(template, messages, continue_final)
    return _render(template, normal, tools or (), add_generation_prompt, variables, continue_final)


def text_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """A prompt of plain text, special tokens recognised.

    What the tokenizer puts before a text (BOS) is structure.
    """
    ids = tokenizer.encode(text, begin=True)
    inner = len(tokenizer.encode(text))
    before = int(inner < len(ids) and ids[0] in tokenizer.special_ids)
    bounds: list[tuple[int, int, Kind]] = [
        (0, before, "structure"),
        (before, before + inner, "content"),
        (before + inner, len(ids), "structure"),
    ]
    return Prompt(ids, tuple(Span(start, end, None, None, kind) for start, end, kind in bounds if end > start))


def begin_answer(tokenizer: Tokenizer, prompt: Prompt, start: str) -> Prompt:
    """A prompt with the beginning of its answer, special tokens recognised, as structure."""
    ids = np.concatenate([prompt.token_ids, tokenizer.encode(start)])
    more = Span(len(prompt), len(ids), None, None, "structure")
    return Prompt(ids, (*prompt.spans, more) if len(more) else prompt.spans)


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Content is a string, tool-call arguments are objects where they are JSON objects. Sent content may be
    a string, null or a list of text parts, which are joined by newlines. Raises RequestError that names the message and
    the field.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    return [_normalise(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalise(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object, not {_kind(message)}", param=where)
    if message.get("role") not in ROLES:
        raise RequestError(
            f"{where}.role is {message.get('role')!r}: expected one of {', '.join(ROLES)}", param=f"{where}.role"
        )
    normal: dict[str, Any] = {
        str(key): _clean(value) for key, value in message.items() if key not in ("content", "tool_calls")
    }
    normal["content"] = _clean(_content_text(message.get("content"), f"{where}.content"))
    if message.get("tool_calls"):
        normal["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    reasoning = next((normal[field] for field in _REASONING_FIELDS if normal.get(field) is not None), None)
    if reasoning is not None:
        normal = {"thinking": reasoning, **normal, "reasoning_content": reasoning}
    return normal


def _content_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} must be a string, null or a list of parts, not {_kind(content)}", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        if not isinstance(part, Mapping) or kind != "text":
            raise RequestError(
                f"{where}[{index}] has type {kind!r}: this model takes parts of type 'text' only", param=where
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{index}].text must be a string, not {_kind(part.get('text'))}", param=where)
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where} must be a list, not {_kind(calls)}", param=where)
    normal = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{index}] must be an object with function.name", param=where)
        arguments = function.get("arguments")
        parsed = _parse_object(arguments) if isinstance(arguments, str) else arguments
        normal.append(_clean({**call, "function": {**function, "arguments": {} if parsed is None else parsed}}))
    return normal


def _parse_object(text: str) -> Any:
    """The object that a JSON text holds; anything else stays the text it is, since a model may have written it."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    return names.get(type(value), type(value).__name__)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string changed, keys included.

    Raises RequestError when it is nested too deeply.
    """
    try:
        return _map_nested(value, change)
    except RecursionError as error:
        raise RequestError("messages and tools must not be nested that deeply", param="messages") from error


def _map_nested(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _map_nested(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_nested(item, change) for item in value]
    return value


def _clean(value: Any) -> Any:
    return _map_strings(value, lambda text: _NONCHARACTERS.sub("", replace_lone_surrogates(text)))


def _control_strings(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the special tokens, and of these with the bracketed added tokens that the template writes."""

    def pattern(strings: Sequence[str]) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(s) for s in strings)) if strings else _NEVER

    special = [s for s in tokenizer.special_strings if len(s) > 1]
    markup = [s for s in tokenizer.added_strings if is_markup(s) and s in template.literals]
    return pattern(special), pattern(special + markup)


def _guard(control: re.Pattern[str]) -> Callable[[str], str]:
    def guard(text: str) -> str:
        pieces, position = [], 0
        # Matches may overlap: cutting one open must not leave another whole.
        while match := control.search(text, position):
            pieces.append(text[position : match.start() + 1])
            position = match.start() + 1
        return GUARD.join([*pieces, text[position:]])

    return guard


def _for_template(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], continue_final: bool
) -> list[dict[str, Any]]:
    normal = normalise_messages(messages)
    if continue_final and normal[-1]["role"] != "assistant":
        raise RequestError("continue_final_message needs a last message of role 'assistant'", param="messages")
    if template.source is not None and "developer" not in template.literals:
        return [{**m, "role": "system"} if m["role"] == "developer" else m for m in normal]
    return normal


def _render(
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None,
    continue_final: bool,
) -> str:
    if not continue_final:
        return template.render(messages, tools, add_generation_prompt, variables)
    *before, last = messages
    return _up_to_end(template.render([*before, {**last, "content": last["content"] + _END}], tools, False, variables))


def _guard_message(message: dict[str, Any], special: re.Pattern[str], markup: re.Pattern[str]) -> dict[str, Any]:
    """A message that can forge nothing.

    Content of the assistant may hold the markup that a model writes itself, such as <think>; its calls' arguments not.
    """
    if message["role"] in ("user", "tool"):
        return _map_strings(message, _guard(markup))
    calls = {"tool_calls": _map_strings(message["tool_calls"], _guard(markup))} if "tool_calls" in message else {}
    return {**_map_strings(message, _guard(special)), **calls}


def _up_to_end(text: str) -> str:
    place = text.rfind(_END.strip())
    if place < 0:
        raise RequestError("the model's chat template leaves out the message that is to be continued", param="messages")
    # Where the template trims a message, it ends without its trailing spaces.
    return text[:place] if text[place:].startswith(_END) else text[:place].rstrip()


def _mark(message: dict[str, Any], index: int) -> dict[str, Any]:
    content = message["content"]
    core = content.strip()
    if not core:
        return message
    name = "".join(chr(_DIGIT_ZERO + int(digit)) for digit in str(index))
    start = content.index(core)
    marked = content[:start] + _OPEN + name + core + _CLOSE + name + content[start + len(core) :]
    return {**message, "content": marked}


def _content_ranges(base: str, marked: str) -> dict[int, tuple[int, int]]:
    """Character ranges (without GUARDs) of the messages whose two marks stand once each.

    Empty if marks changed the text.
    """
    if _MARK.sub("", marked) != base:
        return {}
    places: dict[int, dict[str, list[int]]] = {}
    position, previous = 0, 0
    for match in _MARK.finditer(marked):
        between = marked[previous : match.start()]
        position += len(between) - between.count(GUARD)
        previous = match.end()
        index = int("".join(str(ord(digit) - _DIGIT_ZERO) for digit in match[2]))
        places.setdefault(index, {_OPEN: [], _CLOSE: []})[match[1]].append(position)
    return {
        index: (place[_OPEN][0], place[_CLOSE][0])
        for index, place in places.items()
        if len(place[_OPEN]) == len(place[_CLOSE]) == 1
    }


def _labels(offsets: np.ndarray, contents: dict[int, tuple[int, int]]) -> np.ndarray:
    """Message index per token, -1 for structure; a token that reaches over the edge of a content is structure."""
    if not contents:
        return np.full(len(offsets), -1)
    order = sorted(contents, key=lambda index: contents[index])
    starts = np.asarray([contents[index][0] for index in order])
    ends = np.asarray([contents[index][1] for index in order])
    place = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    inside = (place >= 0) & (offsets[:, 1] <= ends[place]) & (offsets[:, 0] < offsets[:, 1])
    return np.where(inside, np.asarray(order)[place], -1)
