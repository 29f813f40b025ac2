"""What the front end costs: this server against vLLM's own with the same flags, in turn, under vLLM's load.

    python benchmarks/overhead.py [--instances 1] [--launches 7] [--pairs 8] [--requests 40] [--rate inf]

With one instance: `taichi serve --d-heavy 1` against vLLM's server. With two: aggregation (`--d-heavy 2`)
against vLLM's server with `--data-parallel-size 2`. Each instance and each rank has one core. The chunk is
the whole step budget and both servers have the same one, so a step of ours may hold what a step of theirs
may: decodes first, and prompt tokens up to the budget.

Both servers are up, one of them idle. Many short pairs say more than a few long ones: a machine whose speed
moves by half within minutes moves little in the few seconds of a pair, and the interval of the median
shrinks with their number. The two get the same requests (the seed is the pair's), and go first in turn, ours
stock, stock ours. The machine's speed is probed before, between and after them. A pair during which it moved
by more than 5 %, or during which others, the idle server among them, used more than `--others` cores, is
measured again, whatever it says, at most five times; one whose speed moved every time is kept and marked.

A server that is started again is up to 5 % faster or slower than before, in all of its runs: where its
weights lie in memory is luck. So both are started anew for every `--pairs` pairs, `--launches` times.
Printed are the ratios of all pairs, ours over theirs, with the 95 % interval of their median, and the median
of each launch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from generator import Generator
from paired import Figure, Kind, Ratios, Watch, order, wait_for_quiet
from servers import ENVIRONMENT, FLAGS, START_SECONDS, Server, eventually

from taichi_serve.bench.probe import Probe, drift
from taichi_serve.bench.score import DRIFT
from taichi_serve.ports import LOOPBACK, port_of, reserve
from taichi_serve.tiny import cached_tiny_model

BUDGET = 512
CALM = 1.2  # seconds: vLLM's workers keep their cores busy for one second after their last step
FIGURES = (
    Figure("request throughput", "request_throughput", at_least=0.95),
    Figure("output throughput", "output_throughput"),
    Figure("mean TTFT", "mean_ttft_ms", at_most=1.05),
    Figure("median TTFT", "median_ttft_ms", at_most=1.05),
    Figure("median TPOT", "median_tpot_ms"),
    Figure("CPU time, server", "cpu"),
)


@dataclass(frozen=True)
class Plan:
    """What every run of this comparison has in common."""

    instances: int
    requests: int
    rate: str
    others: float  # cores that others may use meanwhile


class Stock:
    """vLLM's own server."""

    def __init__(self, directory: Path, *flags: str, env: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.reserved = reserve()
        port = port_of(self.reserved)
        self.url = f"http://{LOOPBACK}:{port}"
        self.log = directory / "server.log"
        module = "vllm.entrypoints.launchers.api_server.entry"
        words = ["--model", str(cached_tiny_model()), "--port", str(port), *FLAGS, *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=os.environ | ENVIRONMENT | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self) -> Stock:
        """Wait until it answers."""

        def healthy() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
            except httpx.HTTPError:
                return False

        eventually(healthy, START_SECONDS, "vLLM's own server is ready")
        return self

    def end(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait()
        self.reserved.close()


def measure(
    generator: Generator, url: str, directory: Path, requests: int, rate: str, seed: int
) -> dict[str, Any]:
    """One run of `vllm bench serve`."""
    words = ["--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", "tiny"]
    words += ["--tokenizer", str(cached_tiny_model()), "--dataset-name", "random", "--ignore-eos"]
    words += ["--random-input-len", "300", "--random-output-len", "64", "--random-range-ratio", "0.5"]
    words += ["--num-prompts", str(requests), "--request-rate", rate, "--seed", str(seed)]
    result = generator.run(words, directory)
    assert result["completed"] == requests
    return result


def start(kind: Kind, instances: int, directory: Path) -> Server | Stock:
    """Start one of the two with a core for each instance or rank."""
    cores = sorted(os.sched_getaffinity(0))[:instances]
    assert len(cores) == instances, f"{instances} instances need as many cores"
    # vLLM's default for the number of sequences depends on which of its entrypoints asks.
    budget = ("--max-num-batched-tokens", str(BUDGET), "--max-num-seqs", "256")
    if kind == "ours":
        devices = ("--devices", ";".join(map(str, cores)))
        return Server(
            directory, "--d-heavy", str(instances), "--d-chunk", str(BUDGET), *devices, *budget
        ).wait_ready()
    parallel = ("--data-parallel-size", str(instances)) if instances > 1 else ()
    # Unbound, all ranks would share the first core: vLLM leaves the last one to its other processes.
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    return Stock(directory, *parallel, *budget, env=bound).wait_ready()


@dataclass(frozen=True)
class Field:
    """Both servers, warm, the load generator, the probe, and a folder."""

    servers: Mapping[Kind, Server | Stock]
    generator: Generator
    probe: Probe
    directory: Path

    def one(self, kind: Kind, plan: Plan, seed: int) -> dict[str, Any]:
        """Measure one of the two. The result has what Watch.read says, too."""
        server = self.servers[kind]
        watch = Watch(server.process.pid, self.generator.pid)
        result = measure(self.generator, server.url, self.directory, plan.requests, plan.rate, seed)
        found = watch.read()
        time.sleep(CALM)
        return result | found

    def attempt(self, plan: Plan, number: int, seed: int) -> Pair:
        """Both, one after the other."""
        speeds, results = [self.probe.speed()], {}
        for kind in order(number):
            results[kind] = self.one(kind, plan, seed)
            speeds.append(self.probe.speed())
        return Pair(results, tuple(speeds))

    def pair(self, plan: Plan, number: int, attempts: int = 5) -> Pair:
        """Both on a quiet machine whose speed stays; of those whose speed did not the calmest."""
        moved = []
        for attempt in range(attempts):
            # Requests that were sent before are in a prefix cache: in that of one of the two.
            made = self.attempt(plan, number, seed=number * attempts + attempt)
            if made.others > plan.others:
                print(f"pair {number + 1}  others used {made.others:.2f} cores: measured again", flush=True)
                wait_for_quiet(plan.others)
            elif made.drift > DRIFT:
                print(f"pair {number + 1}  the speed moved by {made.drift:.1%}: measured again", flush=True)
                moved.append(made)
            else:
                return made
        assert moved, f"the machine was not quiet in {attempts} attempts"
        return min(moved, key=lambda made: made.drift)


@dataclass(frozen=True)
class Pair:
    """The results of both, and the machine's speed before, between and after them."""

    results: Mapping[Kind, dict[str, Any]]
    speeds: tuple[float, ...]

    @property
    def others(self) -> float:
        """Cores that others used, at most."""
        return float(max(result["others"] for result in self.results.values()))

    @property
    def drift(self) -> float:
        """How far the speed moved."""
        return drift(self.speeds)

    def ratio(self, figure: Figure) -> float:
        """Ours over theirs."""
        return float(self.results["ours"][figure.key] / self.results["stock"][figure.key])

    def told(self, number: int) -> str:
        """In one line."""
        words = [f"{figure.name} {self.ratio(figure):.3f}" for figure in FIGURES]
        mark = "  MOVED" if self.drift > DRIFT else ""
        speeds = " ".join(f"{speed:.1f}" for speed in self.speeds)
        return f"pair {number + 1:3}  {', '.join(words)}; speed {speeds}, moved by {self.drift:.1%}{mark}"


@contextlib.contextmanager
def both(instances: int) -> Iterator[Field]:
    """The two servers, warm, and what measures them."""
    kinds: tuple[Kind, ...] = ("ours", "stock")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        servers: dict[Kind, Server | Stock] = {}
        for kind in kinds:
            servers[kind] = start(kind, instances, Path(name) / kind)
            stack.callback(servers[kind].end)
        generator, probe = stack.enter_context(Generator()), stack.enter_context(Probe.start())
        for number, server in enumerate(servers.values()):
            measure(generator, server.url, Path(name), 40, "inf", seed=10_000 + number)
        yield Field(servers, generator, probe, Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launches", type=int, default=7, help="starts of both (default: 7)")
    parser.add_argument("--pairs", type=int, default=8, help="runs of each in a launch (default: 8)")
    parser.add_argument("--requests", type=int, default=40, help="requests of a run (default: 40)")
    parser.add_argument("--rate", default="inf", help="requests per second (default: inf, all at once)")
    parser.add_argument("--instances", type=int, default=1, choices=(1, 2), help="instances (default: 1)")
    parser.add_argument("--others", type=float, default=0.1, help="cores others may use (default: 0.1)")
    args = parser.parse_args()
    plan = Plan(args.instances, args.requests, args.rate, args.others)
    ratios, pairs, began = Ratios(FIGURES), [], time.monotonic()
    for launch in range(args.launches):
        with both(args.instances) as field:
            wait_for_quiet(plan.others)
            for number in range(launch * args.pairs, (launch + 1) * args.pairs):
                pairs.append(field.pair(plan, number))
                ratios.add(pairs[-1].results["ours"], pairs[-1].results["stock"])
                print(pairs[-1].told(number), flush=True)
    moved = sum(pair.drift > DRIFT for pair in pairs)
    everywhere = drift(speed for pair in pairs for speed in pair.speeds)
    print(f"\n{args.instances} instance(s), ours over stock, {len(pairs)} pairs of {args.requests} requests")
    print(
        f"{time.monotonic() - began:.0f} s; the speed moved by {everywhere:.1%} over all of them, and by more"
    )
    print(f"than {DRIFT:.0%} within {moved} that are kept")
    print("\n".join(ratios.rows()))
    each = [
        median(p.ratio(FIGURES[0]) for p in pairs[k : k + args.pairs])
        for k in range(0, len(pairs), args.pairs)
    ]
    print(f"{FIGURES[0].name} of each launch: {' '.join(f'{ratio:.3f}' for ratio in each)}")


if __name__ == "__main__":
    main()
