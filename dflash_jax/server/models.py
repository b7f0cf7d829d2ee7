"""OpenAI's /v1/models, with the context length under the names that agents look for."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dflash_jax.server.answers import Engine
from dflash_jax.server.errors import ApiError


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_entry(request)]})


async def one_model(request: Request) -> Response:
    """GET /v1/models/{model}."""
    engine: Engine = request.app.state.engine
    asked = request.path_params["model"]
    if asked != engine.model_id:
        message = f"the model {asked[:100]!r} does not exist here; this server has {engine.model_id!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return JSONResponse(_entry(request))


def _entry(request: Request) -> dict[str, Any]:
    # No field may be called max_tokens: agents would take it for the context length.
    engine: Engine = request.app.state.engine
    return {
        "id": engine.model_id,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "dflash-jax",
        "context_length": engine.context_length,
        "max_model_len": engine.context_length,
    }
