"""vLLM's own server as a child process, to stand beside ours: what a user would run instead."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence

import httpx

from taichi_serve.commands.subserver import ServerError, Subserver

ENTRY = "taichi_serve.cluster.vllm.stock"  # `vllm serve`
# Flags of `taichi serve` that vLLM's server does not have: with a value, and without.
OURS = (
    *("p-heavy", "d-heavy", "p-chunk", "d-chunk", "ttft-slo", "tpot-slo", "ttft-margin", "tpot-margin"),
    *("watermark", "alpha", "move-timeout", "stall-timeout", "restarts", "event-log", "profile", "kv-over"),
    *("prefixes", "devices", "autotune", "overload", "slo-classes"),
    *("cluster-host", "ray-address", "keep-engines"),
)
SWITCHES = ("metrics-without-key", "slo-response-headers", "fair-classes", "ray")
KV_SPACE, BINDING = "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"


class StockServer(Subserver):
    """It says nothing of its own about being ready: its /health is asked."""

    module: tuple[str, ...] = (ENTRY,)

    async def sayings(self) -> AsyncIterator[str]:
        """That it is awaited, until it answers. Raises ServerError."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=2.0) as client:
            yield "waiting for vLLM's own server"
            while True:
                if (ended := self.ended) is not None:
                    raise ServerError(f"vLLM's own server ended with exit code {ended}: {self._last()}")
                try:
                    if (await client.get("/health")).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.5)

    def _last(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return (errors or lines or ["it said nothing"])[-1]


def stock_flags(flags: Sequence[str], instances: int, chunk: int | None) -> tuple[str, ...]:
    """Of flags of `taichi serve` those that vLLM's server has, with so many ranks of data parallelism and
    this budget of tokens a step (None: vLLM's own default)."""
    parallel = ("--data-parallel-size", str(instances)) if instances > 1 else ()
    budget = ("--max-num-batched-tokens", str(chunk)) if chunk is not None else ()
    return (*without_ours(flags), *parallel, *budget)


def without_ours(flags: Sequence[str]) -> tuple[str, ...]:
    """Those that are vLLM's."""
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, _ = word.removeprefix("--").replace("_", "-").partition("=")
        if word.startswith("--") and name in OURS:
            if not equals:
                next(words, None)
        elif not (word.startswith("--") and name in SWITCHES):
            kept.append(word)
    return tuple(kept)


def proxied_flags(flags: Sequence[str], instances: int, prefill: int, chunk: int | None) -> tuple[str, ...]:
    """The same for so many servers behind a proxy, of which some prefill for the others; they are on the
    devices of our instances."""
    shape = ("--instances", str(instances), "--prefill", str(prefill))
    devices = value_of(flags, "--devices")
    own = ("--devices", devices) if devices is not None else ()
    return (*stock_flags(flags, 1, chunk), *shape, *own)


def value_of(flags: Sequence[str], name: str) -> str | None:
    """The last value that a flag is given."""
    found = None
    for word, following in zip(flags, (*flags[1:], None), strict=True):
        if word == name:
            found = following
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def stock_environment(instances: int) -> dict[str, str]:
    """What our server does for its instances by itself. It is for CPUs; with GPUs nobody reads it.

    Unbound, all ranks would share the first core: vLLM leaves the last one to its other processes.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // instances)
    bound = [
        ",".join(str(cores[(rank * share + k) % len(cores)]) for k in range(share))
        for rank in range(instances)
    ]
    ours = {BINDING: "|".join(bound), KV_SPACE: "1"}
    return {name: value for name, value in ours.items() if name not in os.environ}
