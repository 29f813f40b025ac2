"""What traces cost: a server that sends them against one that does not, in turn, under vLLM's load.

    PYTHONPATH=src python benchmarks/tracing.py [--launches 2] [--pairs 12] [--requests 60] [--rate inf]
    PYTHONPATH=src python benchmarks/tracing.py --alone [--lives 5000]

Both are `taichi serve` with one P-heavy instance that computes every prompt and one D-heavy instance, so each
request is handed over: the traces are as large as they usually get, eleven spans. The collector is a process
of its own on this machine, which takes spans over gRPC and throws them away. Pairs, probes and what is
measured again are those of overhead.py. Printed are the ratios with traces over without, and the 95 %
interval of their median.

`--alone` starts nothing: the facts of such a request go through the recorder and the scheduler, with traces
and without, in pairs, and are sent to the same collector. Printed is the processor time that traces take for
each request: of the event loop, and with the thread that sends them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from generator import Generator
from overhead import CALM, FIGURES, Field, Plan, measure
from paired import Kind, Ratios, Watch, interval, wait_for_quiet
from servers import Server

from taichi_serve.bench.probe import Probe
from taichi_serve.ports import LOOPBACK

WITH: Kind = "ours"
WITHOUT: Kind = "stock"
COLLECTOR = """
import time, grpc
from concurrent.futures import ThreadPoolExecutor
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse as Response
handler = grpc.unary_unary_rpc_method_handler(lambda request, context: Response().SerializeToString())
service = "opentelemetry.proto.collector.trace.v1.TraceService"
server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": handler})])
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
time.sleep(1e9)
"""


@contextlib.contextmanager
def collector() -> Iterator[tuple[int, str]]:
    """A collector that keeps nothing: its process, and its address."""
    process = subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, f"http://{LOOPBACK}:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Beside(Field):
    """Both servers, and a collector, whose time is nobody else's."""

    collector: int

    def one(self, kind: Kind, plan: Plan, seed: int) -> dict[str, Any]:
        """Measure one of the two."""
        server = self.servers[kind]
        watch = Watch(server.process.pid, self.generator.pid, self.collector)
        result = measure(self.generator, server.url, self.directory, plan.requests, plan.rate, seed)
        found = watch.read()
        time.sleep(CALM)
        return result | found


@contextlib.contextmanager
def both() -> Iterator[Beside]:
    """The two servers, warm, and what measures them."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    flags = ("--p-heavy", "1", "--d-heavy", "1", "--d-chunk", "0", "--devices", ";".join(map(str, cores)))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        pid, endpoint = stack.enter_context(collector())
        servers: dict[Kind, Any] = {}
        for kind, more in ((WITH, ("--otlp-traces-endpoint", endpoint)), (WITHOUT, ())):
            servers[kind] = Server(Path(name) / kind, *flags, *more)
            stack.callback(servers[kind].end)
            servers[kind].wait_ready()
        generator, probe = stack.enter_context(Generator()), stack.enter_context(Probe.start())
        for number, server in enumerate(servers.values()):
            measure(generator, server.url, Path(name), 40, "inf", seed=10_000 + number)
        yield Beside(servers, generator, probe, Path(name), pid)


def served(args: argparse.Namespace) -> None:
    """Pairs of real servers."""
    plan, ratios = Plan(2, args.requests, args.rate, args.others), Ratios(FIGURES)
    for launch in range(args.launches):
        with both() as field:
            wait_for_quiet(plan.others)
            for number in range(launch * args.pairs, (launch + 1) * args.pairs):
                pair = field.pair(plan, number)
                ratios.add(pair.results[WITH], pair.results[WITHOUT])
                print(pair.told(number), flush=True)
    print(f"\nwith traces over without, {args.launches * args.pairs} pairs of {args.requests} requests")
    print("\n".join(ratios.rows()))


# ------------------------------------------------------------------------------------------------- alone


def recorder() -> Any:
    """A recorder over one P-heavy and one D-heavy instance."""
    from taichi_serve.frontend.record import Recorder
    from taichi_serve.latency.predict import Learned
    from taichi_serve.scheduling.policy import Policy
    from taichi_serve.scheduling.scheduler import GlobalScheduler
    from taichi_serve.sliders import Sliders
    from taichi_serve.slo import SLO

    capacities = {"i0": 1 << 20, "i1": 1 << 20}
    return Recorder(
        GlobalScheduler(Sliders(1, 1, 1024, 0), SLO(4, 0.07), Learned(), Policy(), capacities), 2048
    )


def live(recorder: Any, name: str, tracing: Any = None) -> None:
    """A request from its arrival to its end, handed over."""
    from taichi_serve.frontend import names
    from taichi_serve.frontend.traced import ASKING, Asking
    from taichi_serve.messages import Arrived, Finished, Flowed, Prefilled, Timeline

    at = time.monotonic()
    if tracing is not None:
        asking = Asking({"method": "POST", "path": "/v1/completions", "headers": []})
        names.asking.set({ASKING: asking})
        tracing.entered(SimpleNamespace(request_id=name, trace_headers=None))
    line = Timeline(at + 1, at + 1, at + 1.01, at + 1.02, at + 1.03, at + 1.04, at + 1.05, at + 1.06)
    recorder.on(Arrived(at, name, 1000, 64))
    recorder.on(Prefilled(at + 1, name, 0, "i0", held=True))
    recorder.on(Flowed(at + 1.06, name, 1, "i1", 2, 1000, 0.06, 1000, line))
    recorder.on(Finished(at + 2, name, 64))
    if tracing is not None:
        tracing.answered(asking, 200)


def stretch(lives: int, provider: Any = None) -> tuple[float, float]:
    """Microseconds a request: of this thread, and of the whole process until all is sent."""
    from taichi_serve.frontend.tracing import Tracing

    here, tracing = recorder(), None
    if provider is not None:
        tracing = Tracing(provider, here.histories, {}, here.trouble)
        here.observers.append(tracing.observe)
    thread, process = time.thread_time(), time.process_time()
    for number in range(lives):
        live(here, f"cmpl-{number}", tracing)
        if number % 100 == 99:  # or the queue would be full: a server has time between two requests
            time.sleep(0.02)
    thread = time.thread_time() - thread
    if provider is not None:
        provider.force_flush()
    assert here.trouble.counts["tracing"] == 0
    return thread / lives * 1e6, (time.process_time() - process) / lives * 1e6


def alone(args: argparse.Namespace) -> None:
    """Pairs without a server."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    with collector() as (_, endpoint):
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, insecure=True)))
        more = []
        for pair in range(args.pairs):
            found = {}
            for kind in (provider, None) if pair % 2 else (None, provider):
                found[kind is not None] = stretch(args.lives, kind)
            more.append([traced - plain for traced, plain in zip(found[True], found[False], strict=True)])
            print(
                f"pair {pair + 1}  event loop {more[-1][0]:+.0f} us, process {more[-1][1]:+.0f} us",
                flush=True,
            )
        provider.shutdown()
    for what, values in zip(("event loop", "process"), zip(*more, strict=True), strict=True):
        within = interval(values)
        words = f" ({within[0]:.0f} to {within[1]:.0f})" if within else ""
        print(f"traces cost {statistics.median(values):.0f} us{words} of the {what} for each request")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alone", action="store_true", help="without servers")
    parser.add_argument("--lives", type=int, default=5000, help="requests of a stretch (default: 5000)")
    parser.add_argument("--launches", type=int, default=2, help="starts of both (default: 2)")
    parser.add_argument("--pairs", type=int, default=12, help="runs of each in a launch (default: 12)")
    parser.add_argument("--requests", type=int, default=60, help="requests of a run (default: 60)")
    parser.add_argument("--rate", default="inf", help="requests per second (default: inf, all at once)")
    parser.add_argument("--others", type=float, default=0.1, help="cores others may use (default: 0.1)")
    args = parser.parse_args()
    alone(args) if args.alone else served(args)


if __name__ == "__main__":
    main()
