"""Probes of whoever runs the server: whether its process answers, and whether it takes new requests.

vLLM's `/health` is one question for both. Who ends a server because `/health` says 503 ends it while its
instances are being started again, or while its open requests finish.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from taichi_serve.frontend.errors import error

if TYPE_CHECKING:
    from taichi_serve.frontend.system import System

OPEN = frozenset({"/live", "/ready"})  # no key is asked for here (keys.py)

router = APIRouter()


@router.get("/live")
async def get_live() -> Response:
    """200 as long as the process answers: while no instance is up, and while the server ends, too."""
    return Response()


@router.get("/ready")
async def get_ready(request: Request) -> Response:
    """200 where a new request would be taken now; else 503, and why not."""
    system: System = request.app.state.taichi
    why = system.unready()
    return Response() if why is None else error(503, "overloaded_error", why)
