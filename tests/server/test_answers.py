from __future__ import annotations

import json
import socket

import pytest

from tests.server.conftest import eventually

WORDS = [" word"] * 1000


def _send(port: int, stream: bool, **extra) -> socket.socket:
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": stream, **extra}).encode()
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_client_that_vanishes_frees_its_slot(start, stream, phase):
    slow = {"prefill": 30.0} if phase == "prefill" else {"delay": 0.05}
    server = start(words=WORDS, context_length=2000, **slow)
    with _send(server.port, stream):
        assert eventually(lambda: server.engine.gauges()["active_sessions"] == 1)
        (handle,) = server.engine.handles
        assert not handle.cancelled.is_set()
    assert handle.cancelled.wait(1)
    assert handle.ended.wait(1)
    assert eventually(lambda: server.metric('dflash_jax_answers_total{reason="cancelled"}') == 1)
    label = 'path="/v1/chat/completions",status="499"'
    assert eventually(lambda: server.metric(f"dflash_jax_requests_total{{{label}}}") == 1)
    server.engine.prefill, server.engine.words = 0, ["ok"]
    answer = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
    assert answer.json()["choices"][0]["message"]["content"] == "ok"


def test_a_client_that_vanishes_in_the_queue_is_cancelled_there(start):
    server = start(words=WORDS, context_length=2000, delay=0.05)
    with _send(server.port, True):
        assert eventually(lambda: len(server.engine.handles) == 1)
        with _send(server.port, False):
            assert eventually(lambda: len(server.engine.handles) == 2)
        first, second = server.engine.handles
        assert second.cancelled.wait(1)
        assert not first.cancelled.is_set()


def test_a_client_that_vanishes_while_its_prompt_is_tokenised_is_cancelled(start):
    server = start(words=WORDS, context_length=2000, delay=0.05, submit_delay=0.3)
    with _send(server.port, False):
        pass
    assert eventually(lambda: len(server.engine.handles) == 1)
    assert server.engine.handles[0].cancelled.wait(1)


def test_a_client_that_vanishes_within_its_body_leaves_nothing(start):
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    label = 'path="/v1/chat/completions",status="499"'
    assert eventually(lambda: server.metric(f"dflash_jax_requests_total{{{label}}}") == 1)
    assert server.engine.handles == []


def test_closing_a_stream_of_the_official_client_cancels(start):
    server = start(words=WORDS, context_length=2000, delay=0.05)
    stream = server.openai.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    next(iter(stream))
    stream.close()
    assert server.engine.handles[0].cancelled.wait(1)


def test_a_finished_answer_is_not_cancelled(start):
    server = start()
    server.openai.chat.completions.create(model="any", messages=[{"role": "user", "content": "hello"}])
    assert not server.engine.handles[0].cancelled.is_set()


def test_a_client_that_does_not_read_holds_nobody_up(start):
    server = start(words=["x" * 20_000] * 400, context_length=2000)
    with _send(server.port, True):
        assert eventually(lambda: bool(server.engine.handles) and server.engine.handles[0].ended.is_set())
        server.engine.words = ["ok"]
        answer = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
        assert answer.json()["choices"][0]["message"]["content"] == "ok"
