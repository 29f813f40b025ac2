"""What only the scheduler's process can answer, and front ends hand on: /taichi, the page, our metrics.

It is an HTTP server on a socket in the server's directory, which only its user can reach. Whoever comes
there has shown the key to a front end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.entrypoints.launchers.launcher import NoSignalServer

from taichi_serve.frontend.application import http_error
from taichi_serve.frontend.metrics import TaichiCollector
from taichi_serve.frontend.page import router as page
from taichi_serve.frontend.routes import router
from taichi_serve.frontend.scaling import router as scaling

if TYPE_CHECKING:
    from taichi_serve.frontend.system import System

GRACE = 2  # seconds that who is answered at the end may take


def application(system: System) -> FastAPI:
    """The routes that look at the system."""
    registry = CollectorRegistry()
    registry.register(TaichiCollector(system))
    ProcessCollector(registry=registry)  # of this process: front ends leave theirs out
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.taichi = system
    app.include_router(router)
    app.include_router(scaling)
    app.include_router(page)
    app.exception_handler(HTTPException)(http_error)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


@contextlib.asynccontextmanager
async def answered(system: System, path: Path) -> AsyncIterator[None]:
    """While this lasts, the socket at `path` answers."""
    config = uvicorn.Config(
        application(system),
        uds=str(path),
        access_log=False,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=GRACE,
    )
    server = NoSignalServer(config)
    serving = asyncio.create_task(server.serve(), name="inside")
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        path.unlink(missing_ok=True)
