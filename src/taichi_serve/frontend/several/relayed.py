"""Routes of a front end that the scheduler's process answers (inside.py): handed on as they are, and back.

`/metrics` is put together: vLLM's of all front ends, out of the files in which each keeps its own, and ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterator
from typing import Any

import httpx
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse
from starlette.types import Scope
from vllm.v1.metrics.prometheus import get_prometheus_registry

from taichi_serve.frontend.errors import error
from taichi_serve.frontend.series import ENGINE

METHODS = ["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE"]
# Of one hop: whoever hands a message on makes its own.
HOP = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"host", b"content-length", b"date", b"server"}
)
SECONDS = 30.0  # that an answer may take to begin: the scheduler's process is busy, or stands still


class Inside:
    """The other process, as an HTTP client."""

    def __init__(self, path: str) -> None:
        transport = httpx.AsyncHTTPTransport(uds=path)
        timeout = httpx.Timeout(SECONDS, read=None)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://inside", timeout=timeout)

    async def answer(self, request: Request) -> Response:
        """What it says to this request."""
        headers = [(name, value) for name, value in request.headers.raw if name not in HOP]
        body, target = await request.body(), _target(request.scope)
        asked = self._client.build_request(request.method, target, headers=headers, content=body)
        try:
            async with asyncio.timeout(SECONDS):
                answer = await self._client.send(asked, stream=True)
        except (httpx.HTTPError, TimeoutError):
            return error(503, "overloaded_error", "The scheduler does not answer at present.")
        response = StreamingResponse(
            answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose)
        )
        response.raw_headers = [(n.lower(), v) for n, v in answer.headers.raw if n.lower() not in HOP]
        return response

    async def metrics(self) -> bytes:
        """Our own metrics; nothing where it does not answer."""
        try:
            async with asyncio.timeout(SECONDS):
                return (await self._client.get("/metrics")).content
        except (httpx.HTTPError, TimeoutError):
            return b""

    async def close(self) -> None:
        """Ask nothing more."""
        await self._client.aclose()


def router(inside: Inside, engines: Callable[[], Container[str]]) -> APIRouter:
    """The routes. `engines` are the numbers of the instances that are there."""
    routes = APIRouter(include_in_schema=False)

    async def handed_on(request: Request) -> Response:
        return await inside.answer(request)

    async def metrics() -> Response:
        vllms_own, ours = await asyncio.gather(asyncio.to_thread(_of_all, engines()), inside.metrics())
        return Response(vllms_own + ours, media_type=CONTENT_TYPE_LATEST)

    for path in ("/", "/taichi", "/taichi/{rest:path}"):
        routes.add_api_route(path, handed_on, methods=METHODS)
    for path in ("/metrics", "/metrics/"):
        routes.add_api_route(path, metrics, methods=["GET"])
    return routes


def _target(scope: Scope) -> httpx.URL:
    """Path and query as the client spelled them, without a proxy's prefix: an id may have any character."""
    path: bytes = scope["raw_path"].removeprefix(scope.get("root_path", "").encode())
    query: bytes = scope.get("query_string", b"")
    return httpx.URL(raw_path=path + b"?" + query if query else path)


def _of_all(engines: Container[str]) -> Any:
    """vLLM's metrics of all front ends, those that are gone too: a counter never goes back. Those of
    instances that left are in the files, out of which nothing can be taken, and are not shown."""
    shown = CollectorRegistry(auto_describe=False)
    shown.register(Shown(get_prometheus_registry(), engines))
    return generate_latest(shown)


class Shown(Collector):
    """What another registry has of these engines, and of none."""

    def __init__(self, of: Collector, engines: Container[str]) -> None:
        self._of = of
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Everything, now."""
        for metric in self._of.collect():
            metric.samples = [
                one
                for one in metric.samples
                if ENGINE not in one.labels or one.labels[ENGINE] in self._engines
            ]
            yield metric
