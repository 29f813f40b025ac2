"""What the front end costs: this server against vLLM's own with the same flags, in turn, under vLLM's load.

    python benchmarks/overhead.py [--instances 1] [--pairs 5] [--requests 200] [--rate inf] [--others 0.1]

With one instance: `taichi serve --d-heavy 1` against vLLM's server. With two: aggregation (`--d-heavy 2`)
against vLLM's server with `--data-parallel-size 2`. Each instance and each rank has one core. The chunk is
the whole step budget and both servers have the same one, so a step of ours may hold what a step of theirs
may: decodes first, and prompt tokens up to the budget.

Both servers are up, one of them idle: a machine whose processors are faster now and slower in a minute then
gives both the same. They get the same requests (the seed is the pair's), and which goes first alternates. A
measurement waits until the rest of the machine is quiet, and a pair during which others, the idle server
among them, used more than `--others` cores is measured again, whatever it says. Printed are the ratios of all
pairs, ours over theirs, and their medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from paired import Figure, Kind, Ratios, Watch, order, wait_for_quiet
from servers import ENVIRONMENT, FLAGS, START_SECONDS, Server, eventually
from test_stock_load_generator import BENCH

from taichi_serve.ports import LOOPBACK, port_of, reserve
from taichi_serve.tiny import cached_tiny_model

BUDGET = 512
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


def measure(url: str, directory: Path, requests: int, rate: str, seed: int) -> dict[str, Any]:
    """One run of `vllm bench serve`."""
    words = ["--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", "tiny"]
    words += ["--tokenizer", str(cached_tiny_model()), "--dataset-name", "random", "--ignore-eos"]
    words += ["--random-input-len", "300", "--random-output-len", "64", "--random-range-ratio", "0.5"]
    words += ["--num-prompts", str(requests), "--request-rate", rate, "--seed", str(seed), "--save-result"]
    words += ["--result-dir", str(directory), "--result-filename", "result.json"]
    run = subprocess.run(
        [sys.executable, "-c", BENCH, *words],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
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


def one(server: Server | Stock, directory: Path, plan: Plan, seed: int) -> dict[str, Any]:
    """Measure one of the two. The result has what Watch.read says, too."""
    wait_for_quiet(plan.others)
    watch = Watch(server.process.pid)
    result = measure(server.url, directory, plan.requests, plan.rate, seed)
    return result | watch.read()


def pair(
    servers: Mapping[Kind, Server | Stock], directory: Path, plan: Plan, number: int, attempts: int = 5
) -> dict[Kind, dict[str, Any]]:
    """Both, one after the other, on a quiet machine."""
    for attempt in range(attempts):
        # Requests that were sent before are in a prefix cache: in that of one of the two.
        seed = number * attempts + attempt
        results: dict[Kind, dict[str, Any]] = {}
        for kind in order(number):
            results[kind] = one(servers[kind], directory, plan, seed)
            if (others := results[kind]["others"]) > plan.others:
                print(f"pair {number + 1}  others used {others:.2f} cores: measured again", flush=True)
                break
        else:
            return results
    raise AssertionError(f"the machine was not quiet in {attempts} attempts")


@contextlib.contextmanager
def both(instances: int) -> Iterator[tuple[dict[Kind, Server | Stock], Path]]:
    """The two servers, warm, and a folder."""
    kinds: tuple[Kind, ...] = ("ours", "stock")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        servers: dict[Kind, Server | Stock] = {}
        for kind in kinds:
            servers[kind] = start(kind, instances, Path(name) / kind)
            stack.callback(servers[kind].end)
        for number, server in enumerate(servers.values()):
            measure(server.url, Path(name), 40, "inf", seed=1000 + number)
        yield servers, Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--requests", type=int, default=200, help="requests of a run (default: 200)")
    parser.add_argument("--rate", default="inf", help="requests per second (default: inf, all at once)")
    parser.add_argument("--instances", type=int, default=1, choices=(1, 2), help="instances (default: 1)")
    parser.add_argument("--others", type=float, default=0.1, help="cores others may use (default: 0.1)")
    args = parser.parse_args()
    plan = Plan(args.instances, args.requests, args.rate, args.others)
    ratios = Ratios(FIGURES)
    with both(args.instances) as (servers, directory):
        for number in range(args.pairs):
            results = pair(servers, directory, plan, number)
            ratios.add(results["ours"], results["stock"])
            for figure in FIGURES:
                ours, stock = (results[kind][figure.key] for kind in ("ours", "stock"))
                print(f"pair {number + 1}  {figure.name:20} ours {ours:9.2f}  stock {stock:9.2f}", flush=True)
    print(f"\n{args.instances} instance(s), ours over stock, {args.pairs} pairs of {args.requests} requests")
    print("\n".join(ratios.rows()))


if __name__ == "__main__":
    main()
