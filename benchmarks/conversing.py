"""Conversations on running servers: what their prefix caches had, and how long first tokens took.

Several addresses are one server whose requests go round, as with independent servers behind a proxy.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import httpx

from taichi_serve.bench.client import MANY
from taichi_serve.bench.endpoint import Endpoint
from taichi_serve.bench.openloop import OpenLoop, Plan
from taichi_serve.bench.score import Run, Score
from taichi_serve.bench.workload import workload
from taichi_serve.slo import SLO

NEVER = SLO(3600.0, 3600.0)  # nobody is given up: the latest count among the quantiles
PREFIX_TOKENS = re.compile(r'^taichi_prefix_tokens_total\{.*of="(\w+)".*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Traffic:
    """What is sent: `rate` in requests/s, `limit` the model's tokens; the first `warm_up` are not counted."""

    workload: str
    rate: float
    counted: int
    warm_up: int
    limit: int
    slo: SLO

    def plan(self, seed: int) -> Plan:
        """The requests of a seed, with all turns that follow."""
        return Plan.of(workload(self.workload, self.limit), self.rate, self.warm_up, self.counted, seed)


class InTurn(httpx.AsyncBaseTransport):
    """Sends one request after the other to the next of some servers."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._next = cycle([httpx.URL(url) for url in urls])
        self._below = httpx.AsyncHTTPTransport(limits=MANY)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        at = next(self._next)
        request.url = request.url.copy_with(host=at.host, port=at.port)
        return await self._below.handle_async_request(request)

    async def aclose(self) -> None:
        await self._below.aclose()


def prefix_tokens(text: str) -> dict[str, float]:
    """Of a page of metrics: prompt tokens taken for cached (predicted) and found (actual), all instances."""
    found = {"predicted": 0.0, "actual": 0.0}
    for of, value in PREFIX_TOKENS.findall(text):
        found[of] += float(value)
    return found


async def send(urls: Sequence[str], model: str, traffic: Traffic, seed: int) -> dict[str, Any]:
    """Send a seed's requests; the same tokens for the same seed, but for answers, which are a server's own.

    Times are seconds; `cached` is the share of prompt tokens that was not computed, by `usage`.
    """
    async with httpx.AsyncClient(
        transport=InTurn(urls), base_url=urls[0], timeout=httpx.Timeout(None, connect=30.0)
    ) as client:
        score = Score(NEVER, traffic.counted, 0.9)
        before = prefix_tokens((await client.get("/metrics")).text)
        began = time.perf_counter()
        load = OpenLoop(Endpoint(client, model, traffic.limit, ""), salt=seed)
        await load.run(traffic.plan(seed), score, early=False, tell=lambda _: None)
        run = score.run(traffic.rate, time.perf_counter() - began)
        after = prefix_tokens((await client.get("/metrics")).text)
    return row(run, traffic.slo) | {name: after[name] - before[name] for name in after}


def converse(urls: Sequence[str], model: str, traffic: Traffic, seed: int) -> dict[str, Any]:
    """`send`, from where nothing else is waited for."""
    return asyncio.run(send(urls, model, traffic, seed))


def row(run: Run, slo: SLO) -> dict[str, Any]:
    """What a run came to, with every request, so that other SLOs can be asked about later."""
    times = {
        f"{name}_p{round(100 * q)}": run.quantile(name, q) for name in ("ttft", "tpot") for q in (0.5, 0.9)
    }
    good = [s for s in run.samples if s.error is None and slo.good(s.ttft or 0.0, s.tpot or 0.0)]
    return {
        "rate": run.rate,
        "sent": run.sent,
        "failed": run.failed,
        "attainment": len(good) / run.total,
        "cached": run.cached,
        **times,
        "lag": run.lag,
        "seconds": run.seconds,
        "samples": [
            [s.prompt_tokens, s.output_tokens, s.cached_tokens, s.ttft, s.tpot, s.error] for s in run.samples
        ],
    }


def words(row: dict[str, Any]) -> str:
    """A row in a line."""

    def of(name: str, factor: float = 1.0) -> str:
        return "?" if row[name] is None else f"{factor * row[name]:.1f}"

    said = f"cached {of('cached', 100)} %, TTFT p50 {of('ttft_p50', 1e3)} p90 {of('ttft_p90', 1e3)} ms, "
    said += f"TPOT p50 {of('tpot_p50', 1e3)} p90 {of('tpot_p90', 1e3)} ms, good {of('attainment', 100)} %, "
    said += f"{row['sent']} sent, {row['failed']} failed"
    if row["predicted"]:
        error = abs(row["predicted"] - row["actual"]) / max(row["actual"], 1.0)
        said += (
            f", cached tokens predicted {row['predicted']:.0f} actual {row['actual']:.0f} ({error:.1%} off)"
        )
    return said
