"""Our routes, our guard and our metrics in vLLM's FastAPI application."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm.entrypoints.launchers.api_server import entry

from taichi_serve.frontend.attendance import RetryAfter
from taichi_serve.frontend.guard import Guard
from taichi_serve.frontend.metrics import exported
from taichi_serve.frontend.routes import router

if TYPE_CHECKING:
    from taichi_serve.frontend.server import System


@contextlib.contextmanager
def our_application(system: System, args: argparse.Namespace) -> Iterator[None]:
    """While vLLM builds and runs its application, add what is ours to it."""
    vllms_own = entry.build_app

    def build_app(*words: Any, **more: Any) -> FastAPI:
        app = vllms_own(*words, **more)
        app.state.taichi = system
        app.include_router(router)
        app.user_middleware.insert(0, Middleware(RetryAfter, seconds=system.attendance.retry_after))
        app.middleware_stack = app.build_middleware_stack()  # vLLM has built the one without it
        return app

    args.middleware = [*args.middleware, f"{Guard.__module__}.{Guard.__qualname__}"]
    entry.build_app = build_app
    try:
        with exported(system):
            yield
    finally:
        entry.build_app = vllms_own
