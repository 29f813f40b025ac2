"""Twice the goodput for minutes, on real engines: what each mode of `--overload` makes of the same requests.

    python benchmarks/overload.py [--goodput 12] [--seconds 180] [--check 20] [--seed 14]

A server for each mode, one after the other: one P-heavy and one D-heavy instance with the tiny model. Each
first sees half of the goodput for a while, so that it knows how fast it is; then come Poisson arrivals at
twice the goodput, the same for every mode. Each request is sent when it is due, and every one is waited for.
Without `--goodput` that of `serve` is searched first: the highest rate, to 10 %, at which 90 % of them are
good.

Then `vllm bench serve --goodput`, unmodified, sends requests of its own at that rate for `--check` seconds.
Its count of good requests stands beside that of the server's own counters.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import httpx
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from generator import Generator
from servers import Server

from taichi_serve.bench.client import stream
from taichi_serve.bench.endpoint import meet
from taichi_serve.bench.openloop import OpenLoop
from taichi_serve.bench.prompts import Prompts
from taichi_serve.bench.score import Live, Run, Sample
from taichi_serve.bench.sending import PATH
from taichi_serve.bench.trial import Trial, climb, measure
from taichi_serve.bench.workload import Workload, workload
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.cluster.vllm.identity import device_name
from taichi_serve.commands.installed import machine, today, versions
from taichi_serve.scheduling.policy import OVERLOAD
from taichi_serve.slo import SLO
from taichi_serve.tiny import cached_tiny_model

LIMIT = 4096  # tokens of the longest request, as the server has it
FLAGS = (
    *("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "512", "--d-chunk", "128"),
    "--no-enable-prefix-caching",
)
REFUSED = "HTTP 503"
JUDGED = "taichi_slo_requests_total"
HEAD = (
    "| mode | requests | attainment | good requests/s | refused (with Retry-After) | failed "
    "| longest wait, s | by quartile of length | good: client, server | good of vLLM's load: vLLM, server |\n"
    "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|"
)


@dataclass(frozen=True)
class Figures:
    """A load of `seconds` of traffic: counts of requests, the longest wait (s) for a first token, and the
    share of good ones by quartile of prompt length, shortest first. `told` are those that were refused with
    a Retry-After."""

    sent: int
    good: int
    refused: int
    told: int
    failed: int
    seconds: float
    longest: float
    quartiles: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], told: int, seconds: float) -> Figures:
        """Of all requests that were sent; a quartile of none is empty."""
        by_length = sorted(samples, key=lambda sample: sample.prompt_tokens)
        parts = [by_length[n * len(samples) // 4 : (n + 1) * len(samples) // 4] for n in range(4)]
        wrong = [sample.error for sample in samples if sample.error is not None]
        refused = sum(error.startswith(REFUSED) for error in wrong)
        return cls(
            len(samples),
            sum(sample.good for sample in samples),
            refused,
            told,
            len(wrong) - refused,
            seconds,
            max((sample.ttft for sample in samples if sample.ttft is not None), default=0.0),
            tuple(fmean(sample.good for sample in part) for part in parts if part),
        )

    def cells(self) -> tuple[str, ...]:
        """Of a line of the table, from its second cell to that of the quartiles."""
        return (
            str(self.sent),
            f"{self.good / self.sent:.2f}",
            f"{self.good / self.seconds:.2f}",
            f"{self.refused} ({self.told})",
            str(self.failed),
            f"{self.longest:.1f}",
            " ".join(f"{share:.2f}" for share in self.quartiles),
        )


class Load:
    """Requests of one server, each sent when it is due, whatever has become of those before."""

    def __init__(self, client: httpx.AsyncClient, slo: SLO) -> None:
        self._client, self._slo = client, slo
        self._told = 0
        client.event_hooks["response"].append(self._heard)

    async def _heard(self, response: httpx.Response) -> None:
        told = response.headers.get("retry-after", "")
        self._told += response.status_code == 503 and told.isdecimal() and int(told) >= 1

    async def run(self, asked: Workload, rate: float, seconds: float, seed: int) -> Figures:
        """So many seconds of requests at `rate` requests/s, all of them waited for."""
        calls = [*asked.calls(rate, round(rate * seconds), seed)]
        prompts = Prompts(seed, asked.block_size)
        made = [(number, call, prompts.first(call)) for number, call in enumerate(calls)]
        before, began = self._told, time.perf_counter()
        samples = await asyncio.gather(*(self._one(began, seed, *one) for one in made))
        return Figures.of(samples, self._told - before, calls[-1].at)

    async def _one(self, began: float, seed: int, number: int, call: Call, prompt: list[int]) -> Sample:
        live = Live(began + call.at, call.prompt_tokens, call.output_tokens)
        await asyncio.sleep(live.due - time.perf_counter())
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": call.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return Sample.of((seed, number), live, await stream(self._client, PATH, body), self._slo)


async def counted(client: httpx.AsyncClient) -> int:
    """Good requests so far, by the server's own counters."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    samples = (sample for family in families for sample in family.samples if sample.name == JUDGED)
    good = (s.value for s in samples if (s.labels["slo"], s.labels["met"]) == ("both", "true"))
    return round(sum(good))


async def own_goodput(server: Server, args: argparse.Namespace) -> float:
    """The highest rate (requests/s) at which 90 % of the requests are good."""
    trial = Trial(
        args.workload, args.slo, requests=args.requests, seeds=(args.seed,), start=args.guess, step=1.4
    )
    async with meet(server.url, None) as endpoint:
        loop = OpenLoop(endpoint, args.seed)

        async def run(rate: float, early: bool) -> Run:
            made = await measure(loop, trial, trial.lengths(LIMIT), rate, early, lambda score: None)
            print(f"{rate:.2f} requests/s: {made.good} of {made.total} good", file=sys.stderr, flush=True)
            return made

        return (await climb(trial.bracket, run)).rate


def vllms_words(server: Server, rate: float, args: argparse.Namespace) -> list[str]:
    """A load like ours in words of `vllm bench serve`. It asks nothing before: that would be counted, too."""
    prompt, output = args.workload.split("/")
    words = ["--backend", "openai", "--base-url", server.url, "--endpoint", PATH, "--model", "tiny"]
    words += ["--tokenizer", str(cached_tiny_model()), "--dataset-name", "random", "--ignore-eos"]
    words += ["--random-input-len", prompt, "--random-output-len", output, "--random-range-ratio", "0.5"]
    words += ["--request-rate", f"{rate:g}", "--num-prompts", str(round(rate * args.check))]
    words += ["--goodput", f"ttft:{args.slo.ttft * 1e3:g}", f"tpot:{args.slo.tpot * 1e3:g}"]
    return [*words, "--seed", str(args.seed), "--ready-check-timeout-sec", "0", "--disable-tqdm"]


async def agreed(
    server: Server, client: httpx.AsyncClient, generator: Generator, rate: float, args: argparse.Namespace
) -> str:
    """How many of its own requests vLLM's load generator calls good, and how many the server."""
    before = await counted(client)
    with tempfile.TemporaryDirectory() as directory:
        words = vllms_words(server, rate, args)
        result = await asyncio.to_thread(generator.run, words, Path(directory))
    server.quiet(30)
    return f"{round(result['request_goodput'] * result['duration'])}, {await counted(client) - before}"


async def measured(
    server: Server, mode: str, goodput: float | None, generator: Generator | None, args: argparse.Namespace
) -> tuple[float, str]:
    """The goodput, and the line of this mode."""
    if goodput is None:
        goodput = await own_goodput(server, args)
    async with server.client(timeout=900.0) as client:
        load, rate = Load(client, args.slo), args.times * goodput
        asked = workload(args.workload, LIMIT)
        await load.run(asked, goodput / 2, args.learn, args.seed + 1)
        server.quiet(30)
        before = await counted(client)
        found = await load.run(asked, rate, args.seconds, args.seed)
        server.quiet(30)
        both = f"{found.good}, {await counted(client) - before}"
        theirs = "-" if generator is None else await agreed(server, client, generator, rate, args)
    return goodput, f"| {' | '.join((f'`{mode}`', *found.cells(), both, theirs))} |"


def compare(args: argparse.Namespace, generator: Generator | None) -> None:
    """All modes, and the table."""
    goodput, rows = args.goodput, []
    for mode in OVERLOAD:
        with tempfile.TemporaryDirectory() as directory:
            slo = "--ttft-slo", f"{args.slo.ttft:g}", "--tpot-slo", f"{args.slo.tpot:g}"
            server = Server(Path(directory), *FLAGS, *slo, "--overload", mode)
            try:
                server.wait_ready()
                goodput, row = asyncio.run(measured(server, mode, goodput, generator, args))
                server.stop()
            finally:
                server.end()
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print(conditions(goodput, args), HEAD, *rows, sep="\n")


def conditions(goodput: float, args: argparse.Namespace) -> str:
    """What was measured, in a sentence."""
    slo = f"{args.slo.ttft:g} s and {args.slo.tpot * 1e3:g} ms"
    return (
        f"{today()}; {device_name()}, {machine()}; {versions()}. Tiny model in float32, 1P1D (chunks 512 and "
        f"128); {args.workload}, {slo}, seed {args.seed}; own goodput {goodput:.3g} requests/s; "
        f"{args.times:g} times that for {args.seconds:g} s\n"
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = partial(parser.add_argument, type=float)
    number("--goodput", help="requests/s; without it that of `serve` is searched")
    number("--guess", default=8.0, help="requests/s at which that search begins")
    number("--times", default=2.0, help="how many times the goodput comes")
    number("--seconds", default=180.0, help="of traffic in each mode")
    number("--learn", default=15.0, help="seconds of half of the goodput before that")
    number("--check", default=20.0, help="seconds of traffic of vLLM's load generator; 0 for none")
    number("--ttft-slo", default=1.0)
    number("--tpot-slo", default=0.1)
    parser.add_argument("--workload", default="800/24", help="mean lengths of prompts and outputs")
    parser.add_argument("--requests", type=int, default=120, help="at each rate of the search")
    parser.add_argument("--seed", type=int, default=14)
    args = parser.parse_args()
    args.slo = SLO(args.ttft_slo, args.tpot_slo)
    if not args.check:
        compare(args, None)
        return 0
    with Generator() as generator:
        compare(args, generator)
    return 0


if __name__ == "__main__":
    sys.exit(main())
