"""The HTTP requests that a trace is made of, and whether there are traces at all: `--otlp-traces-endpoint`.

Without that flag nothing of tracing is imported, no middleware is added, and no fact is looked at for it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

    from taichi_serve.frontend.client import ClusterLLM
    from taichi_serve.frontend.record import Recorder

ASKING = "taichi_traced"  # in what routes know of an HTTP request
CARRIED = ("traceparent", "tracestate")  # W3C Trace Context
SERVICE = "taichi"  # that spans belong to
QUEUE = 1 << 14  # spans that may wait to be sent: vLLM makes one a request, and here there are ten
PROTOCOLS = ("grpc", "http/protobuf")
PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"


@dataclass(slots=True, eq=False)
class Asking:
    """An HTTP request: what its span will say. `shift` turns seconds of the facts' clock into nanoseconds
    since the epoch; one for all spans of a trace, so a clock that is set meanwhile tears none of them."""

    scope: Scope
    began: int = field(default_factory=time.time_ns)
    shift: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())
    span: Any = None  # once an engine request is made of it
    headers: Mapping[str, str] = field(default_factory=dict)  # that carry this span on
    engine: list[str] = field(default_factory=list)  # its engine requests
    moves: int = 0

    @property
    def carried(self) -> dict[str, str]:
        """The trace that its caller is in."""
        headers = {name.decode("latin-1").lower(): value for name, value in self.scope["headers"]}
        return {name: headers[name].decode("latin-1") for name in CARRIED if name in headers}

    @property
    def route(self) -> str:
        """The route that it was for, of which there are few."""
        return str(getattr(self.scope.get("route"), "path", self.scope["path"]))


class Traces(Protocol):
    """What makes traces of requests (tracing.py). It never waits and never raises, but for `end`."""

    def entered(self, request: EngineCoreRequest) -> None:
        """An engine request is made in the context of an HTTP request."""
        ...

    def answered(self, asking: Asking, status: int | None) -> None:
        """The answer to an HTTP request is over; without a status the client left before it began."""
        ...

    def end(self) -> None:
        """Send what is left; waits for that, a moment."""
        ...


class Traced:
    """Pure ASGI middleware: it knows when an answer begins and when it is over."""

    def __init__(self, app: ASGIApp, tracing: Traces) -> None:
        self.app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through. Only what makes work for an engine becomes a span."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        asking = scope.setdefault("state", {})[ASKING] = Asking(scope)
        status: int | None = None

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            self._tracing.answered(asking, status)
            scope["state"].pop(ASKING)  # or the two would hold each other until the next collection


def refuse(args: argparse.Namespace) -> None:
    """Raise ValueError where spans could not be sent as this command line and the environment say."""
    if args.otlp_traces_endpoint is None:
        return
    if not args.otlp_traces_endpoint.strip():
        raise ValueError("an empty address")
    if (protocol := os.environ.get(PROTOCOL, PROTOCOLS[0])) not in PROTOCOLS:
        raise ValueError(f"{PROTOCOL} is {protocol}, and must be one of {', '.join(PROTOCOLS)}")


def set_defaults(args: argparse.Namespace) -> None:
    """What OpenTelemetry reads from the environment when vLLM's front end makes its provider, where the
    operator has not said it."""
    if args.otlp_traces_endpoint is None:
        return
    if "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        os.environ.setdefault("OTEL_SERVICE_NAME", SERVICE)
    os.environ.setdefault("OTEL_BSP_MAX_QUEUE_SIZE", str(QUEUE))


def traces(args: argparse.Namespace, recorder: Recorder, llm: ClusterLLM) -> Traces | None:
    """What makes traces of requests from here on; None where nobody asked for them."""
    if args.otlp_traces_endpoint is None:
        return None
    from taichi_serve.frontend.tracing import begun

    return begun(recorder, llm)


async def finish(tracing: Traces | None) -> None:
    """The server ends."""
    if tracing is not None:
        await asyncio.to_thread(tracing.end)
