"""Each family's own syntax, as its model writes it and as it gets it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dflash_jax.engine.template import ChatTemplate, pinned_template
from dflash_jax.server.tools import Family, family_of, gemma4, hermes, llama3, plain, qwen3, qwen3_coder
from dflash_jax.server.tools.events import Call, CallArguments, CallFinished, CallStarted, Text, spelled
from tests.server.tools.reading import Said, marked, read

GEMMA_TAGS = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<|tool_response>", "<turn|>")
QWEN_TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


@pytest.mark.parametrize(
    ("name", "family"), [("qwen3", qwen3), ("qwen2.5", hermes), ("gemma_style", plain), ("qwen3_style", qwen3)]
)
def test_the_template_tells_the_family(goldens: Path, name: str, family: object) -> None:
    assert family_of((goldens / "templates" / f"{name}.jinja").read_text(encoding="utf-8")) is family


def test_the_family_of_gemma_4_of_llama_3_and_of_no_template() -> None:
    assert family_of(pinned_template("gemma4")) is gemma4
    llama = """{{ '<|start_header_id|>assistant<|end_header_id|>' }}{{ '"parameters": ' }}"""
    assert family_of(llama) is llama3
    assert family_of(None) is plain
    coder = "{{ '<tool_call>\\n<function=' + name + '>\\n' }}{{ '<parameter=' + key + '>\\n' }}"
    assert family_of(coder) is qwen3_coder
    assert family_of(coder + "{{ '</think>' }}") is qwen3_coder


@pytest.mark.parametrize("hidden", [False, True])
def test_gemma_4_thinks_speaks_and_calls(hidden: bool) -> None:
    answer = (
        '<|channel>thought\nHm.\n\nA tool.\n<channel|>Let me see.<|tool_call>call:look{place:<|"|>Z "x" {,}<|"|>,'
        'days:[1,-2.5e3,null,true,{}],deep:{a:<|"|><|"|>,b:{c:false}}}<tool_call|><|tool_call>call:a.b-c{}<tool_call|>'
    )
    arguments = {"place": 'Z "x" {,}', "days": [1, -2500.0, None, True, {}], "deep": {"a": "", "b": {"c": False}}}
    expected = Said("Let me see.", "Hm.\n\nA tool.", [Call("look", arguments), Call("a.b-c", {})])
    assert read(gemma4, marked(answer, GEMMA_TAGS, hidden=hidden)) == expected


def test_gemma_4_goes_by_tokens_not_by_what_they_spell() -> None:
    answer = '<|channel>thought\nx<channel|><|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>'
    assert read(gemma4, [answer]) == Said(answer)
    quoted = [
        *marked('<|tool_call>call:f{a:<|"|>', GEMMA_TAGS),
        '<|"|><tool_call|>',
        *marked('<|"|>}<tool_call|>', GEMMA_TAGS),
    ]
    assert read(gemma4, quoted).calls == [Call("f", {"a": '<|"|><tool_call|>'})]


def test_gemma_4_goes_on_within_a_thought_that_the_prompt_opened() -> None:
    answer = marked("So rain.\n<channel|>Rain.", GEMMA_TAGS)
    assert read(gemma4, answer, prompt_end="<|channel>thought\n") == Said("Rain.", "So rain.")
    assert read(gemma4, ["Rain."], prompt_end="<|channel>thought\n<channel|>") == Said("Rain.")


def test_a_call_ends_a_thought_of_gemma_4() -> None:
    assert read(gemma4, marked("<|channel>thought\nHm<|tool_call>call:f{}<tool_call|>", GEMMA_TAGS)) == Said(
        "", "Hm", [Call("f", {})]
    )


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"a": "b\\n", \'c\':1}', {"a": "b\n", "'c'": 1}),
        ("{ a : 1 , b : [ 2 ] }", {"a": 1, "b": [2]}),
        ("{path:/tmp/x y.txt,n:007}", {"path": "/tmp/x y.txt", "n": "007"}),
        ("{a:None,b:True}", {"a": None, "b": True}),
        ('{<|"|>a:b<|"|>:<|"|>c<|"|>}', {"a:b": "c"}),
    ],
)
def test_what_gemma_4_writes_almost_right_is_understood(body: str, arguments: dict) -> None:
    assert read(gemma4, marked(f"<|tool_call>call:f{body}<tool_call|>", GEMMA_TAGS)).calls == [Call("f", arguments)]


def test_no_character_of_a_text_passes_for_the_token_that_quotes() -> None:
    pieces = marked("<|tool_call>call:f{a:\ufdd4b\ufdd4}<tool_call|>", GEMMA_TAGS)
    assert read(gemma4, pieces).calls == [Call("f", {"a": "\ufffdb\ufffd"})]


@pytest.mark.parametrize(
    "call",
    [
        "<|tool_call><tool_call|>",
        "<|tool_call>f{}<tool_call|>",
        "<|tool_call>call:{}<tool_call|>",
        "<|tool_call>call:f{a:1<tool_call|>",
        "<|tool_call>call:f{a:}<tool_call|>",
        "<|tool_call>call:f{a:1}}<tool_call|>",
        '<|tool_call>call:f{a:<|"|>b}<tool_call|>',
        "<|tool_call>call:f{a:[1}<tool_call|>",
        "<|tool_call>call:f{1 2",
        "<|tool_call>call:f{a:" + "[" * 100_000 + "<tool_call|>",
        "<|tool_call>call:f{a:1" + "0" * 5000 + "}<tool_call|>",
        "<|tool_call>call:f{a:1e999}<tool_call|>",
    ],
)
def test_a_malformed_call_of_gemma_4_is_text_and_later_ones_are_found(call: str) -> None:
    assert read(gemma4, marked(f"see {call}", GEMMA_TAGS)) == Said(f"see {call}")
    again = marked(f"{call}<|tool_call>call:g{{}}<tool_call|>", GEMMA_TAGS)
    assert read(gemma4, again) == Said(call, "", [Call("g", {})])


def test_a_call_without_its_end_counts_if_it_is_whole() -> None:
    assert read(gemma4, marked("<|tool_call>call:f{a:1}", GEMMA_TAGS)).calls == [Call("f", {"a": 1})]
    assert read(hermes, '<tool_call>\n{"name": "f"}').calls == [Call("f", {})]


@pytest.mark.parametrize("as_tokens", [False, True])
def test_qwen_3_thinks_speaks_and_calls(as_tokens: bool) -> None:
    answer = (
        "<think>\nHm.\n\nTwo.\n</think>\n\nLet me see.\n<tool_call>\n"
        '{"name": "look", "arguments": {"place": "</tool_call> \\"{", "days": [1, null]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    )
    calls = [Call("look", {"place": '</tool_call> "{', "days": [1, None]}), Call("time", {})]
    pieces = marked(answer, QWEN_TAGS, hidden=True) if as_tokens else answer
    assert read(qwen3, pieces) == Said("Let me see.", "Hm.\n\nTwo.", calls)


@pytest.mark.parametrize(
    ("answer", "prompt_end", "expected"),
    [
        ("<think>\n\n</think>\n\nHi", "", Said("Hi")),
        ("Hm.\n</think>\n\nHi", "<think>\n", Said("Hi", "Hm.")),
        ("Write <think> so.", "", Said("Write <think> so.")),
        ("<thin air", "", Said("<thin air")),
        ("<think>\nnever ended", "", Said("", "never ended")),
        ("  two\n\n", "", Said("  two\n\n")),
    ],
)
def test_thoughts_of_qwen_3(answer: str, prompt_end: str, expected: Said) -> None:
    assert read(qwen3, answer, prompt_end) == expected


def test_qwen_2_5_has_no_thoughts() -> None:
    assert read(hermes, "<think>a</think>b") == Said("<think>a</think>b")


@pytest.mark.parametrize(
    "call",
    [
        "<tool_call></tool_call>",
        "<tool_call>\nlook()\n</tool_call>",
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_a_malformed_call_of_qwen_is_text_and_later_ones_are_found(call: str) -> None:
    assert read(hermes, f"see \n{call}") == Said(f"see \n{call}")
    assert read(hermes, f'{call}<tool_call>{{"name": "g"}}</tool_call>') == Said(call, "", [Call("g", {})])


def test_a_string_that_is_never_closed_hides_no_text() -> None:
    answer = 'a<tool_call>{"name": "f</tool_call> b <tool_call>{"name": "g"}</tool_call>'
    assert read(hermes, answer) == Said('a<tool_call>{"name": "f</tool_call> b', "", [Call("g", {})])


def test_arguments_written_as_a_string_are_understood() -> None:
    assert read(hermes, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>').calls == [
        Call("f", {"a": 1})
    ]
    assert read(hermes, '<tool_call>{"name": "f", "parameters": {"a": "\n"}}</tool_call>').calls == [
        Call("f", {"a": "\n"})
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', Said("", "", [Call("f", {"a": 1})])),
        ('\n{"type": "function", "name": "f", "parameters": {}} ', Said("", "", [Call("f", {})])),
        ('{"name": "f"}; {"name": "g"}', Said("", "", [Call("f", {}), Call("g", {})])),
        ('{"name": "f"} and so on', Said(" and so on", "", [Call("f", {})])),
        ('{"name": 1}', Said('{"name": 1}')),
        ('{"capital": "Paris"}', Said('{"capital": "Paris"}')),
        ('Use {"name": "f"}', Said('Use {"name": "f"}')),
        ('{"name": "f", "parameters": {', Said('{"name": "f", "parameters": {')),
        ('{"name": "f", "parameters": {"a": NaN}}', Said('{"name": "f", "parameters": {"a": NaN}}')),
        ("", Said()),
        (" ", Said(" ")),
    ],
)
def test_llama_3(answer: str, expected: Said) -> None:
    assert read(llama3, answer) == expected
    assert read(llama3, marked(f"<|python_tag|>{answer}", ["<|python_tag|>"], hidden=True)) == expected


def test_an_answer_in_json_streams() -> None:
    parser = llama3.parser()
    assert parser.feed(['{"capi']) == [Text('{"capi')]


def test_a_call_is_told_of_in_three_events() -> None:
    parser = hermes.parser(tools={})
    assert parser.feed(['a <tool_call>{"name": "f", "arguments": {"b":1}}']) == [Text("a")]
    assert parser.feed(["</tool_call>"]) == [CallStarted(0, "f"), CallArguments(0, '{"b": 1}'), CallFinished(0)]


def test_plain_text_is_left_alone_and_hidden_tokens_stay_hidden() -> None:
    assert read(plain, "<tool_call><think>") == Said("<tool_call><think>")
    assert read(plain, marked("a<|eot|>b", ["<|eot|>"], hidden=True)) == Said("ab")


def test_lone_surrogates_do_not_reach_the_wire() -> None:
    (call,) = read(hermes, '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>').calls
    assert call.arguments == {"a": "\ufffd"}


CODER_CALL = (
    "<tool_call>\n<function=write>\n<parameter=path>\n/tmp/a b.py\n</parameter>\n<parameter=content>\n"
    "\ndef f():\n  return '</parameter> </tool_call>'\n\n</parameter>\n<parameter=mode>\n{}\n</parameter>\n"
    "</function>\n</tool_call>"
)
CODER_ARGUMENTS = {"path": "/tmp/a b.py", "content": "\ndef f():\n  return '</parameter> </tool_call>'\n"}


def mode(schema: object) -> dict:
    return {"write": {"type": "object", "properties": {"mode": schema}}}


@pytest.mark.parametrize("as_tokens", [False, True])
def test_qwen_3_coder_thinks_speaks_and_calls(as_tokens: bool) -> None:
    answer = f"<think>\nHm.\n</think>\n\nLet me see.\n{CODER_CALL}\n<tool_call><function=time></function></tool_call>"
    calls = [Call("write", CODER_ARGUMENTS | {"mode": "{}"}), Call("time", {})]
    pieces = marked(answer, QWEN_TAGS, hidden=True) if as_tokens else answer
    assert read(qwen3_coder, pieces) == Said("Let me see.", "Hm.", calls)
    assert read(qwen3_coder, f"Hm.\n</think>\n\n{CODER_CALL}", "<think>\n").calls == calls[:1]


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({}, "5", "5"),
        (None, "[5]", "[5]"),
        ({"type": "integer"}, "5", 5),
        ({"type": "number"}, " -2.5e3 ", -2500.0),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "integer"}, "five", "five"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "array"}, '[1, {"a": null}]', [1, {"a": None}]),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"$ref": "#/$defs/Mode"}, '{"a": "x\ny"}', {"a": "x\ny"}),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"anyOf": 3, "type": 4}, "7", "7"),
        ({"type": [{"x": 1}, ["integer"]]}, "7", "7"),
        ({"type": [{"x": 1}, "integer"]}, "7", 7),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": [1, "2"]}, "2", "2"),
        ({"enum": [True, None]}, "None", None),
        ({"enum": 3}, "2", "2"),
        ({"const": 2.5}, "2.5", 2.5),
        ({"const": {"x": 1}}, '{"x": 1}', {"x": 1}),
        ({"anyOf": [{"const": "5"}, {"const": None}]}, "5", "5"),
    ],
)
def test_the_schema_tells_the_type_of_a_value(schema: object, written: str, value: object) -> None:
    (call,) = read(qwen3_coder, CODER_CALL.replace("{}", written), tools=mode(schema)).calls
    assert call.arguments == CODER_ARGUMENTS | {"mode": value}


@pytest.mark.parametrize(
    "call",
    [
        "<tool_call></tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "<tool_call><function=></function></tool_call>",
        "<tool_call><function=f></tool_call>",
        "<tool_call><function=f>a</function></tool_call>",
        "<tool_call><function=f><parameter=>a</parameter></function></tool_call>",
        "<tool_call><function=f><parameter=a>1e999</parameter></function></tool_call>",
        "<tool_call><function=f><parameter=a>b</function></tool_call>",
    ],
)
def test_a_malformed_call_of_qwen_3_coder_is_text_and_later_ones_are_found(call: str) -> None:
    tools = {"f": {"properties": {"a": {"type": "number"}}}}
    assert read(qwen3_coder, f"see \n{call}", tools=tools) == Said(f"see \n{call}")
    after = f"{call}<tool_call><function=g></function></tool_call>"
    assert read(qwen3_coder, after, tools=tools) == Said(call, "", [Call("g", {})])


@pytest.mark.parametrize("family", [gemma4, hermes, llama3, qwen3, qwen3_coder])
@pytest.mark.parametrize("thinking", [False, True])
def test_calls_go_on_from_their_opening(family: Family, thinking: bool) -> None:
    """What is rendered begins with the opening, but for the end of a thought."""
    prompt_end = {gemma4: "<|channel>thought\n", qwen3: "<think>\n", qwen3_coder: "<think>\n"}.get(family, "")
    prompt_end = prompt_end if thinking else ""
    rendered = spelled(family.render([Call("look", {"at": "x"})]))
    for name in (None, "look"):
        start = family.opening(name, prompt_end)
        text = spelled(start)
        if prompt_end or family is qwen3:
            end = {gemma4: "<channel|>", qwen3: "" if thinking else "<think>\n"}.get(family, "")
            end += "" if family is gemma4 else "\n</think>\n\n"
            assert text.startswith(end)
            text = text.removeprefix(end)
        assert rendered.startswith(text)
        assert ("look" in text) == (name is not None)
        rest = marked(rendered.removeprefix(text), GEMMA_TAGS) if family is gemma4 else [rendered.removeprefix(text)]
        assert read(family, [*start, *rest], prompt_end) == Said("", "", [Call("look", {"at": "x"})])


def test_a_model_without_calls_has_no_opening() -> None:
    assert plain.opening("look") == plain.opening(None) == []


@pytest.mark.parametrize(("name", "family"), [("gemma4", gemma4), ("qwen3", qwen3), ("qwen2.5", hermes)])
def test_the_template_writes_calls_after_the_same_opening(goldens: Path, name: str, family: Family) -> None:
    source = pinned_template(name) or (goldens / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source)
    question = {"role": "user", "content": "Hi"}
    function = {"name": "look", "arguments": {"at": "x"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}]
    before = template.render([question], tools)
    after = template.render([question, call], tools, add_generation_prompt=False)
    # Gemma 4 is told by an empty thought not to think, which is left out of what it said before.
    before = before.removesuffix("<|channel>thought\n<channel|>")
    assert after.startswith(before)
    assert after.removeprefix(before).startswith(spelled(family.opening("look", before)))
