"""An OpenTelemetry collector in miniature: takes spans over OTLP, by gRPC or HTTP, and keeps them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from servers import eventually

NANO = 1e-9


@dataclass(frozen=True)
class Seen:
    """One span as it came. Ids in hexadecimal, times in seconds since the epoch."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int  # of opentelemetry.proto.trace.v1.Span.SpanKind: 1 internal, 2 server
    began: float
    ended: float
    attributes: dict[str, Any]
    wrong: str | None
    service: str

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def holds(self, other: Seen, slack: float = 0.005) -> bool:
        """Whether the other is within it."""
        return self.began - slack <= other.began and other.ended <= self.ended + slack


class Collector:
    """What came so far."""

    def __init__(self) -> None:
        self._spans: list[Seen] = []
        self._lock = threading.Lock()

    def take(self, request: ExportTraceServiceRequest) -> None:
        """A batch of spans."""
        with self._lock:
            for of in request.resource_spans:
                service = dict(map(_pair, of.resource.attributes)).get("service.name", "")
                self._spans += [_seen(span, service) for scope in of.scope_spans for span in scope.spans]

    @property
    def spans(self) -> list[Seen]:
        """All of them."""
        with self._lock:
            return list(self._spans)

    def of(self, trace: str) -> list[Seen]:
        """Those of a trace, the first first."""
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.began)

    def whole(self, trace: str, root: str = "POST /v1/completions", seconds: float = 20) -> list[Seen]:
        """Those of a trace, once its root, the last of them, is here."""

        def there() -> list[Seen] | None:
            found = self.of(trace)
            return found if any(span.name == root for span in found) else None

        found: list[Seen] = eventually(there, seconds, f"the trace {trace} is here: {self.of(trace)}")
        return found


def _pair(entry: Any) -> tuple[str, Any]:
    return entry.key, getattr(entry.value, entry.value.WhichOneof("value"))


def _seen(span: Any, service: str) -> Seen:
    return Seen(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano * NANO,
        span.end_time_unix_nano * NANO,
        dict(map(_pair, span.attributes)),
        span.status.message or "an error" if span.status.code == 2 else None,
        service,
    )


@contextmanager
def over_grpc() -> Iterator[tuple[Collector, str]]:
    """A collector, and its address."""
    collector = Collector()

    class Service(TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            collector.take(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def over_http(listens: socket.socket) -> Iterator[Collector]:
    """A collector on a port that is bound already."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            collector.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(listens.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listens
    server.server_activate()
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        yield collector
    finally:
        server.shutdown()
        serving.join()
