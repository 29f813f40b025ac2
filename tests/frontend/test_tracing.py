"""Traces by OpenTelemetry, into memory: which spans there are, whose they are, and what fails quietly."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from taichi_serve.frontend import names, traced
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.traced import Traced
from taichi_serve.frontend.tracing import LOGGER, Complaints, Tracing
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.latency.predict import Average, Learned
from taichi_serve.messages import Arrived, Event, Finished, Flowed, Outcome, Prefilled
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE, PARENT = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7


class Door:
    """What the guard does of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names.asking.set(scope.setdefault("state", {}))
        await self.app(scope, receive, send)


class Here:
    """A server in miniature: the real recorder and tracing over i0 P-heavy and i1 D-heavy, and routes that
    say what became of the engine requests that they make."""

    def __init__(self) -> None:
        capacities = {"i0": 100_000, "i1": 100_000}
        # With a TTFT SLO that nothing meets, the fastest instance prefills: i1 is known to be slow.
        slow = Learned(fixed={"i1": Average(100.0, 1.0)})
        scheduler = GlobalScheduler(Sliders(1, 1, 1024, 256), SLO(1e-6, 0.07), slow, Policy(), capacities)
        self.said: list[str] = []
        self.trouble = Trouble(self.said.append)
        self.recorder = Recorder(scheduler, 2048, None, self.trouble)
        self.states: dict[str, Any] = {}
        self.sent = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.sent))
        self.tracing = Tracing(self.provider, self.recorder.histories, self.states, self.trouble)
        self.recorder.observers.append(self.tracing.observe)
        self.requests: list[SimpleNamespace] = []
        self.vllms: list[Any] = []  # what vLLM's own span was made of
        self.make = self.tracing.llm_request(lambda output, *_: self.vllms.append(output.trace_headers))

    def enter(self, name: str) -> None:
        """As the engine client does."""
        request = SimpleNamespace(request_id=name, trace_headers={"traceparent": CALLER})
        self.requests.append(request)
        self.tracing.entered(request)

    def facts(self, *facts: Event) -> None:
        for fact in facts:
            self.recorder.on(fact)

    def live(self, name: str, tokens: int = 5) -> None:
        """Prefilled on i0 from now on, handed over to i1, and over 1.35 s later."""
        now = time.monotonic()
        self.states[name] = SimpleNamespace(request_id=name, stats=SimpleNamespace(scheduled_ts=now + 0.25))
        self.facts(
            Arrived(now, name, 100, tokens),
            Prefilled(now + 1.0, name, 0, "i0", held=True),
            Flowed(now + 1.1, name, 1, "i1", 2, kv_tokens=100, gap=0.1, reused=100),
        )
        self.make(SimpleNamespace(trace_headers=None), self.states.pop(name))
        self.facts(Finished(now + 1.35, name, tokens))

    async def complete(self, request: Request) -> Response:
        asked = request.query_params
        for number in range(int(asked.get("n", "1"))):
            self.enter(f"r{number}")
        if "stream" in asked:
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        if "cancelled" in asked:
            self.facts(Arrived(time.monotonic(), "r0", 100, 5))
        elif "gone" not in asked:
            for number in range(int(asked.get("n", "1"))):
                self.live(f"r{number}")
        return JSONResponse({}, int(asked.get("status", "200")))

    async def _stream(self) -> Any:
        yield "data: a token\n\n"
        self.live("r0")
        yield "data: [DONE]\n\n"

    async def ask(self, query: str, method: str = "POST", **headers: str) -> httpx.Response:
        routes = [
            Route("/v1/completions", self.complete, methods=["POST", "GET"]),
            Route("/taichi/instances/{name}/drain", lambda _: Response(), methods=["POST"]),
        ]
        layers = [Middleware(Door), Middleware(Traced, tracing=self.tracing)]
        app: Any = Starlette(routes=routes, middleware=layers)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.request(method, query, headers=headers)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """What was sent, by name; a name that comes twice fails."""
        found = self.sent.get_finished_spans()
        assert len({span.name for span in found}) == len(found), [span.name for span in found]
        return {span.name: span for span in found}

    @property
    def idle(self) -> bool:
        """Whether nothing is remembered of any request."""
        return not self.tracing._lives and not self.tracing._asking


@pytest.fixture
def here() -> Here:
    return Here()


SERVER = "POST /v1/completions"


async def test_one_trace_has_the_request_its_prefill_its_move_and_its_decode(here: Here) -> None:
    await here.ask("/v1/completions")
    assert set(here.spans) == {SERVER, "prefill", "queue", "compute", "hand-over", "decode"}
    server = here.spans[SERVER]
    assert server.kind is SpanKind.SERVER
    assert server.parent is None
    assert dict(server.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
        "taichi.outcome": "finished",
        "taichi.moves": 1,
    }
    for name in ("prefill", "hand-over", "decode"):
        span = here.spans[name]
        assert span.context.trace_id == server.context.trace_id
        assert span.parent.span_id == server.context.span_id, name
        assert span.attributes["taichi.request"] == "r0"
    queue = here.spans["queue"]
    assert queue.parent.span_id == here.spans["prefill"].context.span_id
    assert here.idle


async def test_times_are_those_of_the_facts_since_the_epoch(here: Here) -> None:
    before = time.time_ns()
    await here.ask("/v1/completions")
    after = time.time_ns()
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in here.spans.items()}
    assert seconds["prefill"] == pytest.approx(1.0, abs=1e-4)
    assert seconds["queue"] == pytest.approx(0.25, abs=1e-4)
    assert seconds["hand-over"] == pytest.approx(0.1, abs=1e-4)
    assert seconds["decode"] == pytest.approx(0.25, abs=1e-4)
    assert before - 1e6 <= here.spans["prefill"].start_time <= after + 1e6
    assert before <= here.spans[SERVER].start_time
    assert here.spans[SERVER].end_time <= after


async def test_the_trace_of_the_caller_goes_on_and_vllms_own_span_is_within_ours(here: Here) -> None:
    await here.ask("/v1/completions", traceparent=CALLER, tracestate="vendor=1")
    server = here.spans[SERVER]
    assert (server.context.trace_id, server.parent.span_id) == (TRACE, PARENT)
    assert server.parent.is_remote
    own = f"00-{TRACE:032x}-{server.context.span_id:016x}-01"
    assert here.vllms == [{"traceparent": own, "tracestate": "vendor=1"}]
    # An engine would send it back with every token.
    assert here.requests[0].trace_headers is None


async def test_all_choices_of_a_request_are_in_its_one_trace(here: Here) -> None:
    await here.ask("/v1/completions?n=2")
    found = here.sent.get_finished_spans()
    (server,) = [span for span in found if span.name == SERVER]
    moves = [span for span in found if span.name == "hand-over"]
    assert {span.attributes["taichi.request"] for span in moves} == {"r0", "r1"}
    assert {span.context.trace_id for span in found} == {server.context.trace_id}
    assert server.attributes["taichi.moves"] == 2
    assert here.idle


async def test_a_stream_is_open_until_its_last_byte(here: Here) -> None:
    answer = await here.ask("/v1/completions?stream")
    assert "[DONE]" in answer.text
    assert here.spans[SERVER].end_time >= here.spans["prefill"].start_time
    assert here.idle


async def test_a_caller_that_is_not_sampled_costs_nothing_and_neither_does_vllm(here: Here) -> None:
    await here.ask("/v1/completions", traceparent=CALLER[:-2] + "00")
    assert here.spans == {}
    assert here.vllms[0]["traceparent"].endswith("-00")
    assert here.idle


@pytest.mark.parametrize(
    ("query", "method"), [("/taichi/instances/i0/drain", "POST"), ("/v1/completions", "GET")]
)
async def test_what_makes_no_work_for_an_engine_is_no_span(here: Here, query: str, method: str) -> None:
    await here.ask(query, method)
    assert SERVER not in here.spans
    assert here.idle


async def test_a_failure_is_marked(here: Here) -> None:
    await here.ask("/v1/completions?status=503")
    assert here.spans[SERVER].status.status_code is StatusCode.ERROR
    assert here.spans[SERVER].attributes["http.response.status_code"] == 503


async def test_a_request_that_outlives_its_connection_is_told_to_its_end(here: Here) -> None:
    await here.ask("/v1/completions?cancelled")
    assert set(here.spans) == {SERVER}
    assert not here.idle
    here.facts(Finished(time.monotonic(), "r0", 0, Outcome.CANCELLED))
    assert set(here.spans) == {SERVER, "prefill"}
    assert here.spans["prefill"].parent.span_id == here.spans[SERVER].context.span_id
    assert here.idle
    assert here.said == []


async def test_a_request_of_which_no_fact_is_told_is_forgotten(here: Here) -> None:
    await here.ask("/v1/completions?gone")
    assert set(here.spans) == {SERVER}
    assert here.idle


async def test_an_engine_request_outside_of_http_stays_as_it_is(here: Here) -> None:
    here.enter("r0")
    here.live("r0")
    assert here.spans == {}
    assert here.requests[0].trace_headers == {"traceparent": CALLER}
    assert here.vllms == [None]
    assert here.idle


async def test_what_fails_is_told_once_and_counted_and_the_answer_is_whole(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no spans today")

    monkeypatch.setattr(here.tracing._tracer, "start_span", broken)
    for _ in range(3):
        assert (await here.ask("/v1/completions")).status_code == 200
    assert here.trouble.counts["tracing"] >= 3
    assert len(here.said) == 1
    assert "tracing: no spans today" in here.said[0]


# ------------------------------------------------------------------------------------ the collector is down


@pytest.fixture
def complaining(here: Here) -> Iterator[logging.Logger]:
    logger, handler = logging.getLogger(LOGGER), Complaints(here.trouble)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield logging.getLogger(f"{LOGGER}.of_a_test")
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_complaints_of_the_library_are_one_line_and_a_count(here: Here, complaining: logging.Logger) -> None:
    for seconds in (1, 2, 4):
        complaining.warning("Transient error %s, retrying in %ds", "UNAVAILABLE", seconds)
    complaining.debug("nothing that anybody needs to know")
    assert here.trouble.counts["tracing"] == 3
    assert len(here.said) == 1
    assert "Transient error UNAVAILABLE, retrying in 1s" in here.said[0]


def test_a_collector_that_takes_nothing_keeps_no_server_from_its_end(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    left: list[Any] = []
    monkeypatch.setattr(here.provider, "force_flush", stuck.wait)
    monkeypatch.setattr(atexit, "unregister", left.append)
    began = time.monotonic()
    here.tracing.end(0.2)
    assert time.monotonic() - began < 2.0
    stuck.set()
    assert left == [here.provider.shutdown]


# ------------------------------------------------------------------------------------------------ the flag


def words(endpoint: str | None) -> argparse.Namespace:
    return argparse.Namespace(otlp_traces_endpoint=endpoint)


def test_without_the_flag_nothing_is_imported_and_nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    traced.set_defaults(words(None))
    assert "OTEL_SERVICE_NAME" not in os.environ
    assert traced.traces(words(None), None, None) is None  # type: ignore[arg-type]
    asyncio.run(traced.finish(None))
    code = "import sys, taichi_serve.frontend.traced; print([m for m in sys.modules if 'opentelemetry' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_spans_belong_to_a_service_that_an_operator_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_BSP_MAX_QUEUE_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    with monkeypatch.context() as within:
        within.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,zone=a")
        traced.set_defaults(words("here:4317"))
        assert "OTEL_SERVICE_NAME" not in os.environ
    traced.set_defaults(words("here:4317"))
    assert os.environ["OTEL_SERVICE_NAME"] == "taichi"
    assert os.environ["OTEL_BSP_MAX_QUEUE_SIZE"] == "16384"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    traced.set_defaults(words("here:4317"))
    assert os.environ["OTEL_SERVICE_NAME"] == "mine"


def test_where_spans_cannot_be_sent_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    traced.refuse(words(None))
    traced.refuse(words("http://here:4317"))
    with pytest.raises(ValueError, match="an empty address"):
        traced.refuse(words(" "))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    with pytest.raises(ValueError, match=r"is http/json, and must be one of grpc, http/protobuf"):
        traced.refuse(words("http://here:4317"))
