"""What the front end costs: this server against vLLM's own with the same flags, in turn, under vLLM's load.

    python benchmarks/overhead.py [--pairs 5] [--requests 200] [--rate inf] [--instances 1]

With one instance: `taichi serve --d-heavy 1` against `vllm serve`. With two: aggregation (`--d-heavy 2`, one
chunk) against `vllm serve --data-parallel-size 2`. Only one server runs at a time, and the order changes from
pair to pair. Printed are the medians of the ratios, ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from servers import ENVIRONMENT, FLAGS, START_SECONDS, Server, eventually, free_port
from test_stock_load_generator import BENCH

from taichi_serve.tiny import cached_tiny_model

CHUNK = 512
FIGURES = {
    "request throughput": "request_throughput",
    "output throughput": "output_throughput",
    "mean TTFT": "mean_ttft_ms",
    "median TTFT": "median_ttft_ms",
    "median TPOT": "median_tpot_ms",
}


class Stock:
    """vLLM's own server."""

    def __init__(self, directory: Path, *flags: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / "server.log"
        module = "vllm.entrypoints.launchers.api_server.entry"
        words = ["--model", str(cached_tiny_model()), "--port", str(port), *FLAGS, *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=os.environ | ENVIRONMENT,
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


def one(kind: str, args: argparse.Namespace, directory: Path, seed: int) -> dict[str, Any]:
    """Start one of the two, warm it, measure it, stop it."""
    budget = ("--max-num-batched-tokens", str(CHUNK + 256))
    server: Server | Stock
    if kind == "ours":
        # The step budget of the stock server counts decodes too, ours only prompts: both get the same total.
        flags = ("--d-heavy", str(args.instances), "--d-chunk", str(CHUNK), *budget)
        server = Server(directory / "ours", *flags)
    else:
        parallel = ("--data-parallel-size", str(args.instances)) if args.instances > 1 else ()
        server = Stock(directory / "stock", *parallel, *budget)
    try:
        server.wait_ready()
        measure(server.url, directory, 20, "inf", seed=1000 + seed)
        return measure(server.url, directory, args.requests, args.rate, seed)
    finally:
        server.end()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--requests", type=int, default=200, help="requests of a run (default: 200)")
    parser.add_argument("--rate", default="inf", help="requests per second (default: inf, all at once)")
    parser.add_argument("--instances", type=int, default=1, choices=(1, 2), help="instances (default: 1)")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {name: [] for name in FIGURES}
    for pair in range(args.pairs):
        results = {}
        for kind in ("ours", "stock") if pair % 2 else ("stock", "ours"):
            with tempfile.TemporaryDirectory() as directory:
                results[kind] = one(kind, args, Path(directory), seed=pair)
        for name, key in FIGURES.items():
            ours, stock = results["ours"][key], results["stock"][key]
            ratios[name].append(ours / stock)
            print(
                f"pair {pair + 1}  {name:20} ours {ours:9.2f}  stock {stock:9.2f}  ratio {ours / stock:.3f}"
            )
    print(f"\nmedian of {args.pairs} ratios, ours over stock, {args.instances} instance(s)")
    for name, values in ratios.items():
        print(f"{name:20} {statistics.median(values):.3f}")


if __name__ == "__main__":
    main()
