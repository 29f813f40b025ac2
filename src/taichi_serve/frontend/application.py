"""Our routes, our guard and our metrics in vLLM's FastAPI application."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from vllm.entrypoints.launchers.api_server import entry

from taichi_serve.frontend import anthropic_stream, parsed
from taichi_serve.frontend.body import Intake
from taichi_serve.frontend.errors import error
from taichi_serve.frontend.guard import MAX_HEADERS, Guard
from taichi_serve.frontend.keys import Keys
from taichi_serve.frontend.metrics import exported
from taichi_serve.frontend.page import router as page
from taichi_serve.frontend.probes import router as probes
from taichi_serve.frontend.routes import router
from taichi_serve.frontend.scaling import router as scaling
from taichi_serve.frontend.terms import Promises
from taichi_serve.frontend.traced import Traced, Traces
from taichi_serve.frontend.turned_away import TurnedAway
from taichi_serve.scheduling.policy import SERVE

if TYPE_CHECKING:
    from taichi_serve.frontend.system import System


@contextlib.contextmanager
def our_application(system: System, args: argparse.Namespace) -> Iterator[None]:
    """While vLLM builds and runs its application, add what is ours to it."""

    def finish(app: FastAPI) -> None:
        app.state.taichi = system
        promises = Promises(system.classes, lambda: system.scheduler.slo, args.slo_response_headers)
        closing, retry_after = lambda: system.front.closing, system.attendance.retry_after
        tracing, drained = system.tracing, system.drained
        furnish(app, args, closing, retry_after, promises, tracing=tracing, drained=drained)

    with finished_by(finish), exported(system):
        yield


@contextlib.contextmanager
def finished_by(finish: Callable[[FastAPI], None]) -> Iterator[None]:
    """While this lasts, applications that vLLM builds are finished so, and what they read is looked at."""
    vllms_own = entry.build_app

    def build_app(*words: Any, **more: Any) -> FastAPI:
        app = vllms_own(*words, **more)
        finish(app)
        return app

    entry.build_app = build_app
    try:
        with parsed.looked_at(), anthropic_stream.worded():
            yield
    finally:
        entry.build_app = vllms_own


def furnish(
    app: FastAPI,
    args: argparse.Namespace,
    closing: Callable[[], bool],
    retry_after: Callable[[], int | None] = lambda: None,
    promises: Promises | None = None,
    routers: Sequence[APIRouter] = (router, scaling, page, probes),
    tracing: Traces | None = None,
    drained: Callable[[], float] = lambda: 0.0,
) -> None:
    """Our routes, and the door around everything that vLLM, or its operator, has put around them. While no
    instance lives `retry_after` says in how many seconds one is expected back. `promises` are what requests
    may ask for, and `tracing` is told of them where there are traces. `drained` is in how many seconds the
    first instance is through with what is queued there."""
    for ours in routers:
        app.include_router(ours)
    app.exception_handler(parsed.Refusal)(parsed.answer)
    app.exception_handler(HTTPException)(http_error)
    door = Middleware(
        Guard,
        keys=Keys.of(args),
        intake=Intake(),
        closing=closing,
        max_headers=args.h11_max_header_count or MAX_HEADERS,
        retry_after=retry_after,
        promises=promises,
    )
    traced = [] if tracing is None else [Middleware(Traced, tracing=tracing)]
    # Within the door: no answer begins before it is known whether its request is turned away.
    within = [Middleware(TurnedAway, drained=drained)] if _turns_away(args) else []
    # vLLM has built the stack already, so it is built anew.
    _count_on(app)
    app.user_middleware[:0] = [door, *traced, *within]
    app.middleware_stack = app.build_middleware_stack()


def _turns_away(args: argparse.Namespace) -> bool:
    """Whether a request may be turned away that a route has begun to answer."""
    bounds = args.max_num_queued_reqs, args.max_num_queued_tokens
    return args.overload != SERVE or any(bound is not None for bound in bounds)


def _count_on(app: FastAPI) -> None:
    """The counters of HTTP requests can be registered but once: the next stack has those of this one."""
    layer: Any = app.middleware_stack
    while layer is not None and not isinstance(layer, PrometheusInstrumentatorMiddleware):
        layer = getattr(layer, "app", None)
    for made in app.user_middleware:
        if layer is not None and made.cls is PrometheusInstrumentatorMiddleware:
            made.kwargs["instrumentations"] = layer.instrumentations


def http_error(_: Request, wrong: HTTPException) -> JSONResponse:
    """What the router itself refuses (no such route, no such method); vLLM words only what FastAPI raises."""
    kind = "not_found_error" if wrong.status_code == 404 else "invalid_request_error"
    answer = error(wrong.status_code, kind, f"{wrong.detail}.")
    answer.headers.update(wrong.headers or {})
    return answer
