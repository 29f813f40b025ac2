"""One trace for each HTTP request that reaches an engine, by OpenTelemetry, wherever the request runs.

    POST /v1/completions               server; continues the caller's traceparent
    |- llm_request                     vLLM's own, with its gen_ai.* attributes
    |- prefill                         on the instance that it was sent to; with queue, compute, fetch
    |- decode                          one for each leg, on its instance
    `- hand-over, degrade, ...         each move; with announce, copy ahead, leave, tail, landing

vLLM's front end makes the tracer provider and what sends spans: in a thread, in batches, from a queue that is
bounded. Spans of a request are made of its facts when it is over (dashboard/spans.py). Whatever fails here is
counted as trouble, and serving goes on.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from taichi_serve.dashboard.span import Span, moved
from taichi_serve.dashboard.spans import Told, spans
from taichi_serve.frontend import names
from taichi_serve.frontend.client import ClusterClient, ClusterLLM
from taichi_serve.frontend.record import History, Recorder
from taichi_serve.frontend.traced import ASKING, Asking
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.messages import Command, Decode, Event, Finished, Flow, Flowed, Prefill, Prefilled

WHAT = "tracing"  # kind of trouble
SCOPE = "taichi_serve"  # by which its spans are told from those of vLLM
OURS, UNSET = InstrumentationScope(SCOPE), Status()
FLUSH_SECONDS = 2.0  # that the end of the server waits for a collector to take the last spans
LOGGER = "opentelemetry"  # what its libraries complain to
W3C = TraceContextTextMapPropagator()


@dataclass(slots=True, eq=False)
class Life:
    """An engine request that is traced, until its last fact: when its legs were decided, and vLLM's own times
    of it."""

    asking: Asking
    decided: dict[int, float] = field(default_factory=dict)
    times: Any = None  # vllm.v1.metrics.stats.RequestStateStats

    @property
    def scheduled(self) -> float | None:
        """When an engine began with its prompt; vLLM has 0 where it does not know."""
        return getattr(self.times, "scheduled_ts", 0.0) or None


class Tracing:
    """Makes the spans. Nothing here waits, and nothing raises."""

    def __init__(
        self, provider: Any, histories: Mapping[str, History], states: Mapping[str, Any], trouble: Trouble
    ) -> None:
        """`provider` makes and sends spans, `histories` are those of requests by the recorder, and `states`
        is what vLLM's front end knows of them."""
        self._provider = provider
        self._tracer = provider.get_tracer(SCOPE)
        self._resource, self._new_id = provider.resource, provider.id_generator.generate_span_id
        self._ended = provider._active_span_processor.on_end  # what sends them
        self._histories = histories
        self._states = states
        self._asking: dict[str, Asking] = {}  # by engine request, while its HTTP request is open
        self._lives: dict[str, Life] = {}  # until it is over
        self.entered = trouble.guarded(WHAT, self._entered)
        self.observe = trouble.guarded(WHAT, self._observe)
        self.answered = trouble.guarded(WHAT, self._answered)

    # ------------------------------------------------------------------------------------- from the front end

    def _entered(self, request: EngineCoreRequest) -> None:
        """An engine request is made of the HTTP request in whose context we are. What carries the trace stays
        here: an engine would send it back with every token."""
        asking: Asking | None = (names.asking.get() or {}).get(ASKING)
        if asking is None:
            return
        if asking.span is None:
            self._begin(asking)
        name = request.request_id
        asking.engine.append(name)
        self._asking[name] = asking
        request.trace_headers = None
        if asking.span.is_recording():
            self._lives[name] = Life(asking)

    def _begin(self, asking: Asking) -> None:
        method, route = asking.scope["method"], asking.route
        asking.span = self._tracer.start_span(
            f"{method} {route}",
            W3C.extract(asking.carried),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route, "url.path": asking.scope["path"]},
            start_time=asking.began,
        )
        carrier: dict[str, str] = {}
        W3C.inject(carrier, trace.set_span_in_context(asking.span))
        asking.headers = carrier

    def _answered(self, asking: Asking, status: int | None) -> None:
        """The answer is over; without a status the client left before it began."""
        if asking.span is None:
            return
        for name in asking.engine:
            self._asking.pop(name, None)
            if name not in self._histories:  # no fact was ever told of it, so none will end it
                self._lives.pop(name, None)
        if status is not None:
            asking.span.set_attribute("http.response.status_code", status)
            if status >= 500:
                asking.span.set_status(Status(StatusCode.ERROR))
        asking.span.end()

    def llm_request(self, vllms_own: Any) -> Any:
        """vLLM's function that makes its span of a request; made to belong to the trace of its HTTP request,
        however the request came to its end."""

        def made(output: EngineCoreOutput, state: Any, *more: Any) -> None:
            if (asking := self._asking.get(state.request_id)) is not None:
                output.trace_headers = asking.headers
            vllms_own(output, state, *more)

        return made

    # --------------------------------------------------------------------------------------------- from facts

    def _observe(self, event: Event, commands: Sequence[Command]) -> None:
        """A fact, and what was decided."""
        for command in commands:
            if isinstance(command, Prefill | Decode | Flow) and (life := self._lives.get(command.request)):
                life.decided[command.leg] = event.at
        if isinstance(event, Prefilled | Flowed):  # a rescue may have made its first token
            life, state = self._lives.get(event.request), self._states.get(event.request)
            if life is not None and life.times is None and state is not None:
                life.times = state.stats
        elif isinstance(event, Finished) and (life := self._lives.pop(event.request, None)) is not None:
            self._tell(life, event)

    def _tell(self, life: Life, event: Finished) -> None:
        """Make the spans of an engine request that is over."""
        asking, name = life.asking, event.request
        parent = asking.span.get_span_context()
        found = spans(self._histories.get(name, ()), Told(life.decided, life.scheduled))
        for span in found:
            self._send(span, parent, asking.shift, {"taichi.request": name})
        asking.moves += sum(map(moved, found))
        if asking.span.is_recording():  # not where the client left before
            asking.span.set_attributes({"taichi.outcome": event.outcome.value, "taichi.moves": asking.moves})

    def _send(self, span: Span, parent: SpanContext, shift: int, more: Mapping[str, str]) -> None:
        # A tracer would ask its sampler and guard each span against writers beside it: 17 us instead of 2.
        made = SpanContext(parent.trace_id, self._new_id(), False, parent.trace_flags, parent.trace_state)
        wrong = Status(StatusCode.ERROR, span.wrong) if span.wrong is not None else UNSET
        whole = ReadableSpan(
            span.name,
            made,
            parent,
            self._resource,
            {**more, **span.attributes},
            status=wrong,
            start_time=_nanoseconds(span.began, shift),
            end_time=_nanoseconds(span.ended, shift),
            instrumentation_scope=OURS,
        )
        for part in span.parts:
            self._send(part, made, shift, {})
        self._ended(whole)

    def end(self, seconds: float = FLUSH_SECONDS) -> None:
        """Send what is left, for at most so long: a collector that is down keeps no server from its end."""
        flushing = threading.Thread(target=self._provider.force_flush, name="last spans", daemon=True)
        flushing.start()
        flushing.join(seconds)
        atexit.unregister(self._provider.shutdown)  # it would wait for the collector, half a minute


def _nanoseconds(at: float, shift: int) -> int:
    return int(at * 1e9) + shift


class Complaints(logging.Handler):
    """What OpenTelemetry complains of is trouble: the first is told, and all are counted."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(logging.WARNING)
        self._trouble = trouble

    def emit(self, record: logging.LogRecord) -> None:
        """Count it; it may come from the thread that sends spans."""
        self._trouble.note(WHAT, record.getMessage())


def begun(recorder: Recorder, llm: ClusterLLM) -> Tracing:
    """Tracing of all requests of this front end, whose provider vLLM has made."""
    logger = logging.getLogger(LOGGER)
    logger.addHandler(Complaints(recorder.trouble))
    logger.setLevel(logging.WARNING)  # whatever others made of it in this process
    logger.propagate = False  # or every batch that a collector does not take would be a line
    processor, core = llm.output_processor, llm.engine_core
    assert isinstance(core, ClusterClient)
    known = recorder.histories, processor.request_states
    tracing = Tracing(trace.get_tracer_provider(), *known, recorder.trouble)
    core.tracing = tracing
    recorder.observers.append(tracing.observe)
    processor.do_tracing = recorder.trouble.guarded(WHAT, tracing.llm_request(processor.do_tracing))
    if not llm.log_stats:  # without its statistics vLLM's own span has nothing to say, and would raise
        processor.tracing_enabled = False
    return tracing
