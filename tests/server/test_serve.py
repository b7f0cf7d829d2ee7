from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from dflash_jax.server.serve import serve
from tests.conftest import REPOSITORY

PROGRAM = """
import sys
from dflash_jax.server.serve import serve
from tests.server.fake_engine import FakeEngine

def load(progress):
    progress("loading", 1, 2)
    return FakeEngine(words=[" word"] * {words}, delay=0.05, context_length=10_000)

serve(load, "127.0.0.1", 0)
print("closed", flush=True)
"""


@contextlib.contextmanager
def _server(words: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM.format(words=words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        try:
            assert process.stdout is not None
            greeting = process.stdout.readline()
            curl = process.stdout.readline()
            url = greeting.split()[-1]
            assert curl.startswith(f"curl {url}/chat/completions "), (greeting, curl)
            yield process, url
        finally:
            process.kill()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_running_answers_and_refuses_new_ones(sig):
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with _server(words=20) as (process, url):
        with httpx.stream("POST", f"{url}/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "assistant" in next(lines)
            process.send_signal(sig)
            text = "".join(lines)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/models")
        assert text.count(" word") == 20
        assert text.endswith("[DONE]")
        out, err = process.communicate(timeout=5)
        assert process.returncode == 0
        assert out == "closed\n"
        assert "finishing 1 running answers" in err
        assert "Traceback" not in err
        assert err.startswith("[") and "loading (1/2)" in err


def test_a_second_signal_quits_at_once():
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with _server(words=5000) as (process, url), httpx.stream("POST", f"{url}/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while "finishing" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=2) == 128 + signal.SIGTERM


def test_an_idle_server_stops_at_once():
    with _server(words=1) as (process, url):
        assert httpx.get(f"{url}/models").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=2) == 0


def test_a_request_whose_body_has_not_come_does_not_hold_up_the_end():
    with _server(words=1) as (process, url):
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=5) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.3)  # until the server waits for the rest
            process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: client.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"the server is shutting down" in answer
        assert process.wait(timeout=2) == 0


def test_a_port_in_use_is_an_error_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"^port {port} is in use; choose another with --port$"):
            serve(lambda progress: pytest.fail("loaded"), "127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_ours_is_an_error(host):
    with pytest.raises(OSError, match=f"^host '{host}' is not an address of this machine"):
        serve(lambda progress: pytest.fail("loaded"), host, 0)
