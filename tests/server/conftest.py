"""A real HTTP server over a fake engine, and the official client."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
import uvicorn

from dflash_jax.server.app import create_app
from tests.server.fake_engine import FakeEngine


@dataclasses.dataclass(frozen=True)
class Server:
    engine: FakeEngine
    port: int
    http: httpx.Client
    openai: openai.OpenAI

    def metric(self, line: str) -> float:
        """The value of one sample, 0 when it is not there yet."""
        for sample in self.http.get("/metrics").text.splitlines():
            name, _, value = sample.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts a server: keywords of FakeEngine, and api_key and keep_alive of create_app."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(_running(**options))


@pytest.fixture(scope="module")
def _shared() -> Iterator[Server]:
    with _running() as server:
        yield server


@pytest.fixture
def server(_shared: Server) -> Server:
    """A server that answers at once; the tests of a module share it, its engine forgets what came before."""
    _shared.engine.handles.clear()
    return _shared


@contextlib.contextmanager
def _running(api_key: str | None = None, keep_alive: float = 5.0, **options: object) -> Iterator[Server]:
    engine = FakeEngine(**options)  # type: ignore[arg-type]
    app = create_app(engine, api_key=api_key, keep_alive=keep_alive)
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=2)
    uvicorn_server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
        thread.start()
        url = f"http://127.0.0.1:{port}"
        with (
            httpx.Client(base_url=url, timeout=10) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, timeout=10) as client,
        ):
            yield Server(engine, port, http, client)
        uvicorn_server.should_exit = True
        thread.join()
    engine.close()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
