"""Log-probabilities in the two shapes of OpenAI, whole and streamed."""

from __future__ import annotations

import pytest

from dflash_jax.engine.request import Marker

QUESTION = [{"role": "user", "content": "What is the capital?"}]
WORDS = ["Paris", " is", " the", " capital", "."]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_tokens_have_their_alternatives(server, stream):
    asked = {"model": "any", "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    answer = server.openai.chat.completions.create(**asked, stream=stream)
    found = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
    entries = [entry for part in found if part is not None for entry in part.content]
    assert [entry.token for entry in entries] == WORDS
    assert [bytes(entry.bytes).decode() for entry in entries] == WORDS
    assert {entry.logprob for entry in entries} == {-0.5}
    for entry in entries:
        assert [(other.token, other.logprob) for other in entry.top_logprobs] == [
            ("\ufffd\0", -1.0),
            ("\ufffd\1", -2.0),
        ]
        assert [other.bytes for other in entry.top_logprobs] == [[0xE2, 0x80, 0], [0xE2, 0x80, 1]]


def test_logprobs_are_null_when_nobody_asks(server):
    for body in ({}, {"logprobs": False}):
        answer = server.http.post("/v1/chat/completions", json={"messages": QUESTION, **body}).json()
        assert answer["choices"][0]["logprobs"] is None


def test_openais_stream_helper_accumulates_logprobs(server):
    with server.openai.chat.completions.stream(model="any", messages=QUESTION, logprobs=True) as stream:
        final = stream.get_final_completion()
    assert [entry.token for entry in final.choices[0].logprobs.content] == WORDS
    assert [entry.top_logprobs for entry in final.choices[0].logprobs.content] == [[]] * 5


def test_logprobs_of_markup_wait_for_the_next_piece_of_the_stream(start):
    hidden = Marker(0, "<|x|>", True)
    server = start(words=("One", hidden, " two", hidden))
    chunks = server.openai.chat.completions.create(model="any", messages=QUESTION, logprobs=True, stream=True)
    told = [len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs]
    assert told == [1, 2, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_text_completions_have_four_lists(server, stream):
    answer = server.openai.completions.create(model="any", prompt="The capital", logprobs=2, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
    parts = [part for part in parts if part is not None]
    assert len(parts) == (5 if stream else 1)
    assert [token for part in parts for token in part.tokens] == WORDS
    assert [value for part in parts for value in part.token_logprobs] == [-0.5] * 5
    assert [place for part in parts for place in part.text_offset] == [0, 5, 8, 12, 20]
    expected = {"bytes:\\xe2\\x80\\x00": -1.0, "bytes:\\xe2\\x80\\x01": -2.0}
    assert [top for part in parts for top in part.top_logprobs] == [{**expected, word: -0.5} for word in WORDS]


def test_a_text_completion_without_alternatives(server):
    answer = server.openai.completions.create(model="any", prompt="The capital", logprobs=0)
    assert answer.choices[0].logprobs.top_logprobs == [{word: -0.5} for word in WORDS]
