"""Errors in the shape that OpenAI's clients expect: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dflash_jax.engine.request import OverloadedError, RequestError

VANISHED_STATUS = 499
"""What the metrics call a request whose client went away; nobody receives it."""


class ApiError(Exception):
    """An answer that is an error. `message` says what was given, what was expected and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> Response:
        """The error as it is sent."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def api_error(error: Exception) -> ApiError:
    """The answer to whatever a handler or the engine raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, OverloadedError):
        return overloaded(str(error), error.retry_after)
    return ApiError(500, "the server failed on this request; its log says why", type="server_error")


def overloaded(message: str, retry_after: int = OverloadedError.retry_after) -> ApiError:
    """Come again in `retry_after` seconds."""
    headers = {"Retry-After": str(retry_after)}
    return ApiError(503, message, type="server_error", code="overloaded", headers=headers)


def failed(message: str) -> ApiError:
    """An accepted request that the engine could not finish."""
    return ApiError(500, message, type="server_error", code="generation_failed")


async def _handle(request: Request, error: Exception) -> Response:
    return api_error(error).response()


async def _handle_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is nothing at {request.method} {request.url.path}; the endpoints are under /v1",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    message = messages.get(error.status_code, error.detail)
    code = codes.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


HANDLERS: Mapping[Any, Any] = {
    ApiError: _handle,
    RequestError: _handle,
    OverloadedError: _handle,
    HTTPException: _handle_http,
    Exception: _handle,
}
"""For Starlette: an exception's class and what answers it."""
