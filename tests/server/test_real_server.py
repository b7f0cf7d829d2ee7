"""The real command, the real model, the official client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from dflash_jax.bench.haystack import NEEDLES, conversation

pytestmark = pytest.mark.slow

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def base_url(default_model: Path) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "dflash_jax",
        "serve",
        str(default_model),
        "--port",
        "0",
        "--context-length",
        "4096",
        "--pflash=auto",
        "--bsa=on",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()  # comes when the server is ready
        assert greeting, process.communicate()[1]
        url = greeting.split()[-1]
        urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=30).close()
        yield url
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def test_a_question_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=CHAT, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


def test_streamed_text_is_the_whole_text(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="any", messages=CHAT, temperature=0, stream=True)  # type: ignore[arg-type]
    texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(texts) == "The capital of France is Paris."
    assert len([text for text in texts if text]) > 1


def test_a_fact_in_a_long_conversation_is_found_in_a_pruned_prompt(client: openai.OpenAI) -> None:
    needle = NEEDLES[3]
    chat = conversation(10_000, needle, depth=0.4, offset=70_000)
    answer = client.chat.completions.create(model="any", messages=chat, temperature=0, max_tokens=30)  # type: ignore[arg-type]
    assert needle.answer in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    pflash = answer.usage.model_dump()["pflash"]
    assert pflash["scored_tokens"] > 2000
    assert pflash["kept_tokens"] < 0.4 * answer.usage.prompt_tokens
    again = client.chat.completions.create(model="any", messages=chat, temperature=0, max_tokens=30)  # type: ignore[arg-type]
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 0.9 * again.usage.prompt_tokens
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_a_prompt_beyond_the_window_is_a_400_and_the_server_goes_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "word " * 5000}])
    assert refused.value.code == "context_length_exceeded"
    test_a_question_is_answered(client)


def test_the_model_says_how_much_it_can_read_and_nothing_was_compiled_while_serving(base_url: str) -> None:
    with urllib.request.urlopen(f"{base_url}/models") as reply:
        (model,) = json.load(reply)["data"]
    assert model["context_length"] == model["max_model_len"] == 4096

    def compilations() -> str:
        with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics") as reply:
            lines = reply.read().decode().splitlines()
        return next(line for line in lines if "compilations" in line and not line.startswith("#"))

    before = compilations()
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        client.chat.completions.create(model="any", messages=CHAT, temperature=0.8, top_p=0.9, max_tokens=9)  # type: ignore[arg-type]
    assert compilations() == before
