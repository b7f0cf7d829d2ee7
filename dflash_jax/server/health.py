"""/health: open to everybody, so that supervisors need no key."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


async def health(request: Request) -> Response:
    """GET /health."""
    return JSONResponse({"status": "ok", "model": request.app.state.engine.model_id})
