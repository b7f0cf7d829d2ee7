from __future__ import annotations

import gzip

import pytest

MESSAGES = '"messages": [{"role": "user", "content": "hi"}]'
CHAT = "/v1/chat/completions"


def _error(answer, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe{\x00}\x00",
        b'{"messages": "\xff"}',
        b'{"messages": NaN}',
        b'{"messages": "\\ud800", }',
        b'{"messages": "\xed\xa0\x80"}',
        b"[" * 1_000_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        gzip.compress(b"{}", mtime=0),
    ],
)
def test_what_is_not_json_is_refused(server, body):
    assert _error(server.http.post(CHAT, content=body))["code"] == "invalid_json"
    assert server.http.post(CHAT, content=f"{{{MESSAGES}}}").status_code == 200


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"', "true"])
def test_what_is_not_an_object_is_refused(server, body):
    assert "must be a JSON object" in _error(server.http.post(CHAT, content=body))["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("{}", "messages"),
        ('{"messages": []}', "messages"),
        ('{"messages": null}', "messages"),
        ('{"messages": "hello"}', "messages"),
        ('{"messages": {"role": "user"}}', "messages"),
        ('{"messages": ["hello"]}', "messages[0]"),
    ],
)
def test_messages_must_be_a_list_of_objects(server, body, param):
    assert _error(server.http.post(CHAT, content=body))["param"] == param
    assert server.engine.handles == []


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", ['"1"', "1.5", "true", "0", "-1", "[]"]),
        ("max_completion_tokens", ["0", '"many"']),
        ("temperature", ['"1"', "-0.1", "2.1", "1e30", "1e999", "true", "[]"]),
        ("top_p", ["0", "1.0001", '"a"']),
        ("top_k", ["-2", "0.5", '"a"']),
        ("min_p", ["-1", "1.1"]),
        ("seed", ["1.5", '"a"', "9" * 4000]),
        ("stop", ["3", '""', '[""]', '["a", 3]', '["a"' + ', "a"' * 16 + "]", '"' + "a" * 1001 + '"']),
        ("stream", ['"true"', "1"]),
        ("stream_options", ["[]", "true"]),
        ("tools", ["{}", '["a"]', '"a"']),
        ("user", ["3"]),
        ("n", ['"1"', "1.5"]),
        ("presence_penalty", ["-2.1", "2.1", '"1"', "true"]),
        ("frequency_penalty", ["-3", "1e300", "[]"]),
        ("repetition_penalty", ["0", "-1", "11", '"a"']),
        ("logit_bias", ["[]", '{"5": 101}', '{"a": 1}', '{"-5": 1}', '{"5.0": 1}', '{"5": "1"}', '{"5": null}']),
        ("logprobs", ["1", '"true"']),
        ("top_logprobs", ["-1", "21", "1000000", "true", "5"]),
        ("model", ["3", "[]"]),
    ],
)
def test_a_field_of_the_wrong_type_or_size_is_named(server, field, values):
    for value in values:
        error = _error(server.http.post(CHAT, content=f'{{{MESSAGES}, "{field}": {value}}}'))
        assert error["param"].split("[")[0] == field, value
        assert error["message"].startswith(field)
        assert len(error["message"]) < 300
    assert server.engine.handles == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "2"),
        ("n", "0"),
        ("n", "1000000"),
        ("response_format", '{"type": "json_object"}'),
    ],
)
def test_what_cannot_be_done_is_said(server, field, value):
    error = _error(server.http.post(CHAT, content=f'{{{MESSAGES}, "{field}": {value}}}'))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    "extra",
    [
        '"unknown": {"deep": [1, 2]}',
        '"n": 1, "logprobs": false, "logit_bias": {}, "frequency_penalty": 0, "response_format": {"type": "text"}',
        '"max_tokens": 1000000000000000000000000',
        '"max_tokens": 65536, "reasoning_effort": "none", "think": false, "options": {"num_ctx": 1}',
        '"presence_penalty": 2, "frequency_penalty": -2.0, "repetition_penalty": 1.1',
        '"logit_bias": {"7": -100, "8": 1.5}',
        '"logprobs": true, "top_logprobs": 20',
        '"logprobs": false, "top_logprobs": 0',
        '"temperature": 1, "seed": -5, "tool_choice": "auto", "parallel_tool_calls": true, "tools": []',
        '"stop": []',
        '"stream_options": {"include_usage": true, "continuous_usage_stats": false}',
        '"stop": "a", "stop": null',
    ],
)
def test_what_clients_send_besides_is_accepted(server, extra):
    assert server.http.post(CHAT, content=f"{{{MESSAGES}, {extra}}}").status_code == 200


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (r"\ud800", "\ufffd"),
        (r"a\uDFFFb", "a\ufffdb"),
        (r"\ud83d\n", "\ufffd\n"),
        (r"\udc00\ud83d\ude00\uD83D", "\ufffd\U0001f600\ufffd"),
        (r"\\ud800\ud800", "\\ud800\ufffd"),
        (r"\ud800\ud83d\ude00", "\ufffd\U0001f600"),
        (r"\"\ud800\\", '"\ufffd\\'),
    ],
)
def test_half_a_surrogate_pair_is_replaced(server, sent, read):
    answer = server.http.post(CHAT, content=f'{{"messages": [{{"role": "user", "content": "{sent}"}}]}}')
    assert answer.status_code == 200
    assert server.engine.handles[-1].request.messages[0]["content"] == read


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (["a"] * 17, "stop: list should have at most 16 items after validation, not 17"),
        (["a", 3], "stop[1]: input should be a valid string, not 3"),
        (["a", ""], "stop[1]: string should have at least 1 character, not ''"),
        ("", "stop: string should have at least 1 character, not ''"),
    ],
)
def test_what_is_wrong_with_stop_strings_is_said(server, stop, message):
    answer = server.http.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}], "stop": stop})
    assert _error(answer)["message"] == message


def test_a_byte_order_mark_is_no_reason_to_refuse(server):
    assert server.http.post(CHAT, content=b"\xef\xbb\xbf{" + MESSAGES.encode() + b"}").status_code == 200


def test_a_body_that_is_too_large_is_refused_by_its_declared_or_its_real_size(server):
    big = b" " * (16 * 2**20 + 1)
    assert _error(server.http.post(CHAT, content=big), 413)["code"] == "body_too_large"
    pieces = (big[:1_000_000] for _ in range(18))
    assert _error(server.http.post(CHAT, content=pieces), 413)["code"] == "body_too_large"


@pytest.mark.parametrize("prompt", ["[]", "[1, 2]", "3", "null", '["a", "b"]', "{}"])
def test_a_text_completion_takes_one_text(server, prompt):
    error = _error(server.http.post("/v1/completions", content=f'{{"prompt": {prompt}}}'))
    assert error["param"].split("[")[0] == "prompt"


@pytest.mark.parametrize("prompt", [[1, 2], [1], [[1, 2]], [[1], [2]]])
def test_token_ids_are_not_taken_for_a_text(server, prompt):
    error = _error(server.http.post("/v1/completions", json={"prompt": prompt}))
    assert error["message"] == "prompt: token ids are not supported, send the prompt as a string"


@pytest.mark.parametrize(("choice", "given"), [(5, "5"), (True, "True"), ([], "a list of 0")])
def test_a_tool_choice_is_a_string_or_an_object(server, choice, given):
    body = {"messages": [{"role": "user", "content": "a"}], "tool_choice": choice}
    error = _error(server.http.post(CHAT, json=body))
    assert error["message"] == f"tool_choice: input should be a string or an object, not {given}"


def test_a_text_completion_takes_a_list_of_one_text(server):
    answer = server.http.post("/v1/completions", json={"prompt": ["one two"]})
    assert answer.json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("extra", [{"echo": True}, {"suffix": "x"}, {"best_of": 3}])
def test_what_text_completions_cannot_do_is_said(server, extra):
    answer = server.http.post("/v1/completions", json={"prompt": "a", **extra})
    assert _error(answer)["code"] == "unsupported_parameter"


@pytest.mark.parametrize("value", [-1, 21, True, "1"])
def test_logprobs_of_a_text_completion_are_a_number(server, value):
    error = _error(server.http.post("/v1/completions", json={"prompt": "a", "logprobs": value}))
    assert error["param"] == "logprobs"
