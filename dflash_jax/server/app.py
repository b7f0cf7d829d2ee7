"""The web application: which path goes where, who may come in, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dflash_jax.server import health, metrics, models, openai_chat
from dflash_jax.server.answers import Engine
from dflash_jax.server.errors import HANDLERS, VANISHED_STATUS, ApiError
from dflash_jax.server.tools import family_of

_ROUTES = [
    Route("/v1/chat/completions", openai_chat.chat_completions, methods=["POST"]),
    Route("/v1/completions", openai_chat.completions, methods=["POST"]),
    Route("/v1/models", models.list_models),
    Route("/v1/models/{model:path}", models.one_model),
    Route("/health", health.health),
    Route("/metrics", metrics.metrics_page),
]
_OPEN_PATHS = ("/health",)
_COUNTED_PATHS = {route.path for route in _ROUTES}


def create_app(engine: Engine, *, api_key: str | None = None, keep_alive: float = 5.0) -> Starlette:
    """The application over an engine that is ready.

    With an `api_key`, every path but /health wants it as a Bearer token (or as x-api-key). While an answer is silent, a
    comment is streamed every `keep_alive` seconds. Setting the event `app.state.stopping` gives up requests whose body
    has not come yet. No CORS headers are sent, so pages of other origins read nothing.
    """
    counts = metrics.Metrics(engine.gauges)
    middleware = [Middleware(_Count, metrics=counts)]
    if api_key:
        middleware.append(Middleware(_Authorise, api_key=api_key))
    app = Starlette(routes=_ROUTES, middleware=middleware, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.engine = engine
    app.state.family = family_of(engine.chat_template)
    app.state.metrics = counts
    app.state.keep_alive = keep_alive
    app.state.stopping = asyncio.Event()
    app.state.started = int(time.time())
    return app


class _Count:
    """Counts requests by path and status, and ends those whose client went away without a fuss."""

    def __init__(self, app: ASGIApp, metrics: metrics.Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except ClientDisconnect:
            status = VANISHED_STATUS
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"]
            self._metrics.count_request(path if path in _COUNTED_PATHS else "other", status)


class _Authorise:
    """Lets only those in who have the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        message = "a valid API key is needed: send it as `Authorization: Bearer KEY`"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), self._key)
