from __future__ import annotations

import json

import openai
import pytest

from dflash_jax.engine.request import OverloadedError, Sampling
from tests.server.conftest import eventually
from tests.server.fake_engine import DFLASH, PFLASH

QUESTION = [{"role": "user", "content": "What is the capital?"}]


def test_a_whole_answer(server):
    answer = server.openai.chat.completions.create(model="any", messages=QUESTION)
    assert answer.object == "chat.completion"
    assert answer.model == "fake/model"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Paris is the capital.")
    assert choice.finish_reason == "stop"


def test_usage_has_openais_fields_and_ours(server):
    usage = server.openai.chat.completions.create(model="any", messages=QUESTION).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 5, 9)
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert usage.pflash == {"scored_tokens": 100, "kept_tokens": 25, "keep_ratio": 0.25, "score_ms": 12.5}
    assert usage.dflash == {"verify_steps": 4, "committed_tokens": 14, "accept_length": 3.5}
    assert (PFLASH.keep_ratio, DFLASH.accept_length) == (0.25, 3.5)


def test_a_streamed_answer_has_openais_order_of_chunks(server):
    stream = server.openai.chat.completions.create(
        model="any", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    *middle, last, usage = chunks[1:]
    assert [chunk.choices[0].delta.content for chunk in middle] == ["Paris", " is", " the", " capital", "."]
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in middle)
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert usage.choices == []
    assert usage.usage.completion_tokens == 5
    assert usage.usage.dflash["accept_length"] == 3.5


def test_a_stream_ends_with_done_and_says_no_usage_unasked(server):
    answer = server.http.post("/v1/chat/completions", json={"messages": QUESTION, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    assert all("usage" not in json.loads(event) for event in events[:-1])


def test_openais_stream_helper_accumulates(server):
    with server.openai.chat.completions.stream(model="any", messages=QUESTION) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Paris is the capital."


@pytest.mark.parametrize("stream", [False, True])
def test_text_completions(server, stream):
    answer = server.openai.completions.create(model="any", prompt="The capital of France is", stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Paris is the capital."
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert server.engine.handles[0].request.prompt == "The capital of France is"


@pytest.mark.parametrize("stop", [" cap", [" nowhere", " cap"]])
def test_stop_strings(server, stop):
    answer = server.openai.chat.completions.create(model="any", messages=QUESTION, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Paris is the", "stop")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit(server, name):
    answer = server.openai.chat.completions.create(model="any", messages=QUESTION, **{name: 2})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Paris is", "length")


def test_sampling_fields_reach_the_engine(server):
    extra = {"top_k": 40, "min_p": 0.05, "ignore_eos": True, "repetition_penalty": 1.2}
    options = {"temperature": 0, "top_p": 0.9, "seed": 7, "max_tokens": 3, "stop": "x", "logit_bias": {"5": -1}}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    server.openai.chat.completions.create(
        model="any", messages=QUESTION, **options, **penalties, logprobs=True, top_logprobs=2, extra_body=extra
    )
    assert server.engine.handles[0].request.sampling == Sampling(
        max_tokens=3,
        temperature=0.0,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        seed=7,
        stop=("x",),
        ignore_eos=True,
        repetition_penalty=1.2,
        **penalties,
        logit_bias={5: -1},
        logprobs=2,
    )


def test_absent_and_null_fields_mean_openais_defaults(server):
    names = ["temperature", "top_p", "stop", "max_tokens", "seed", "stream", "n", "logprobs", "top_logprobs"]
    names += ["presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"]
    nulls = dict.fromkeys(names)
    for body in ({"messages": QUESTION}, {"messages": QUESTION, **nulls}):
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
    first, second = (handle.request.sampling for handle in server.engine.handles)
    assert first == second == Sampling(temperature=1.0)


def test_a_top_k_of_minus_one_means_off(server):
    server.http.post("/v1/chat/completions", json={"messages": QUESTION, "top_k": -1})
    assert server.engine.handles[0].request.sampling.top_k == 0


def test_messages_and_tools_reach_the_engine_unchanged(server):
    tools = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "name": "read", "content": "text"},
    ]
    server.openai.chat.completions.create(model="any", messages=messages, tools=tools)
    request = server.engine.handles[0].request
    assert (request.messages, request.tools) == (messages, tools)


@pytest.mark.parametrize(
    ("headers", "extra", "session"),
    [
        ({}, {}, None),
        ({"X-Session-Id": "a"}, {"user": "u"}, "a"),
        ({"x-session-affinity": "b"}, {}, "b"),
        ({"X-Claude-Code-Session-Id": "c"}, {}, "c"),
        ({}, {"session": "d", "user": "u"}, "d"),
        ({}, {"prompt_cache_key": "e"}, "e"),
        ({}, {"user": "u" * 1000}, "u" * 256),
    ],
)
def test_session_hints(server, headers, extra, session):
    server.http.post("/v1/chat/completions", json={"messages": QUESTION, **extra}, headers=headers)
    assert server.engine.handles[0].request.session == session


def test_silence_before_the_first_token_is_filled_with_comments(start):
    server = start(prefill=0.35, keep_alive=0.1)
    body = {"messages": QUESTION, "stream": True}
    lines = server.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert '"role":"assistant"' in lines[0]
    assert 2 <= lines.count(": keep-alive") <= 4
    chunks = server.openai.chat.completions.create(model="any", messages=QUESTION, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Paris is the capital."


def test_a_prompt_that_is_too_long(start):
    server = start(context_length=4)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            server.openai.chat.completions.create(model="any", messages=QUESTION, stream=stream)
        assert error.value.code == "context_length_exceeded"
        assert error.value.param == "messages"
        assert "maximum context length is 4 tokens" in error.value.message
        assert error.value.type == "invalid_request_error"


def test_an_overloaded_engine_says_when_to_come_back(start):
    server = start(submit_error=OverloadedError("the queue is full (8 requests are waiting)"))
    with pytest.raises(openai.InternalServerError) as error:
        server.openai.chat.completions.create(model="any", messages=QUESTION)
    assert (error.value.status_code, error.value.code) == (503, "overloaded")
    assert error.value.response.headers["retry-after"] == "1"


def test_a_full_queue_recovers(start):
    server = start(max_queue=1, delay=0.2)
    body = {"messages": QUESTION, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as first:
        lines = first.iter_lines()
        assert next(lines)
        assert eventually(lambda: server.engine.gauges()["active_sessions"] == 1)
        with server.http.stream("POST", "/v1/chat/completions", json=body):
            assert server.http.post("/v1/chat/completions", json=body).status_code == 503
    assert eventually(lambda: all(handle.ended.is_set() for handle in server.engine.handles))
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_failure_before_the_end_is_an_error(start):
    server = start(fail_at=3)
    with pytest.raises(openai.InternalServerError, match="on fire") as error:
        server.openai.chat.completions.create(model="any", messages=QUESTION)
    assert error.value.code == "generation_failed"


def test_a_failure_in_a_stream_is_an_event_after_what_was_said(start):
    server = start(fail_at=3)
    said = []
    with pytest.raises(openai.APIError, match="on fire"):
        for chunk in server.openai.chat.completions.create(model="any", messages=QUESTION, stream=True):
            said.append(chunk.choices[0].delta.content)
    assert said == ["", "Paris", " is"]


def test_a_bug_in_the_engine_is_a_500_in_openais_shape_without_details(start):
    server = start(submit_error=KeyError("secret"))
    # uvicorn closes the connection after such an error; a client that has not noticed must not send on it again.
    answer = server.http.post("/v1/chat/completions", json={"messages": QUESTION}, headers={"Connection": "close"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    server.engine.submit_error = None
    assert server.http.post("/v1/chat/completions", json={"messages": QUESTION}).status_code == 200
