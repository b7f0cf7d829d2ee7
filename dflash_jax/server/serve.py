"""From nothing to a running server: bind the port, load and warm up, listen, and finish what runs when told to stop."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from dflash_jax.console import Progress, progress_bar
from dflash_jax.server.answers import Engine
from dflash_jax.server.app import create_app

BACKLOG = 256


def serve(engine: Engine | Callable[[Progress], Engine], host: str, port: int, api_key: str | None = None) -> None:
    """Serves until SIGTERM or SIGINT. `engine` may be a function that loads one and reports its progress.

    The port is bound before anything is loaded, so that one in use is an error at once, and opens when the engine is
    warm. Port 0 takes any free one. On a signal running answers are finished; a second signal quits at once.
    Raises OSError with a line that says what to do.
    """
    with _bind(host, port) as listener:
        with progress_bar() as progress:
            ready = engine if not callable(engine) else engine(progress)
            ready.warm_up(progress)
            progress("checking the drafter", 0, 0)
            warning = ready.self_check()
        try:
            _listen(listener, port)
            if warning:
                print(warning, file=sys.stderr, flush=True)
            print(_greeting(ready, listener, api_key), flush=True)
            _run(ready, listener, api_key)
        finally:
            ready.close(drain=True)


class _Server(uvicorn.Server):
    """Takes SIGTERM as calmly as SIGINT, and ends the process with status 0 when answers have been finished."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        asyncio.get_running_loop().call_soon_threadsafe(self._stopping.set)
        waiting = len(self.server_state.tasks)
        note = f"finishing {waiting} running answers; once more quits at once" if waiting else "stopping"
        print(f"\n{signal.Signals(sig).name}: {note}", file=sys.stderr, flush=True)


def _run(engine: Engine, listener: socket.socket, api_key: str | None) -> None:
    app = create_app(engine, api_key=api_key)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
    )
    asyncio.run(_Server(config, app.state.stopping).serve(sockets=[listener]))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise OSError(f"host {host!r} is not an address of this machine; use 127.0.0.1 or 0.0.0.0") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Without it a restart would have to wait until the last connections of its predecessor are forgotten.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _bind_error(error, host, port) from error
    return listener


def _listen(listener: socket.socket, port: int) -> None:
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _bind_error(error, listener.getsockname()[0], port) from error


def _bind_error(error: OSError, host: str, port: int) -> OSError:
    if error.errno == errno.EADDRINUSE:
        return OSError(f"port {port} is in use; choose another with --port")
    if error.errno == errno.EACCES:
        return OSError(f"port {port} needs more rights than this user has; choose one above 1023 with --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return OSError(f"host {host!r} is not an address of this machine; use 127.0.0.1 or 0.0.0.0")
    return error


def _greeting(engine: Engine, listener: socket.socket, api_key: str | None) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{host}:{port}/v1"
    key = ' -H "Authorization: Bearer $API_KEY"' if api_key else ""
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    return (
        f"{engine.model_id} with {engine.context_length} tokens of context at {url}\n"
        f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
