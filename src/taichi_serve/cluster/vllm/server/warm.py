"""Every ordered pair of instances moves one small request before the server says it is ready, and before an
instance that was started again is given work.

NIXL's first pull between two instances makes a handshake of one to several seconds; no user should wait
for it. It also shows that the pair can move KV at all. One more request on each instance stays there, and
asks for logprobs: no user should wait for what is compiled then either.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from itertools import permutations
from typing import Protocol

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.process import StartError

BLOCKS = 2
OUTPUT = 2  # tokens
TURNS = 2  # the first meeting of a pair goes another way than all that follow
# What the request that stays asks for in each turn: the code that finds them is compiled at its first use,
# which takes seconds, and on a GPU once for each number.
LOGPROBS = (1, 5)
MEASURE = 9  # a turn of its own: other prompts than in the turns before
SECONDS = 180.0  # that one turn may take
DECODES, STEPS = 8, 16  # requests and output tokens of each by which a step is timed

Pair = tuple[Engine, Engine]


class LateError(StartError):
    """Each one is well by itself, and no pair failed, but some have not moved a request in time: who is under
    load has prompts of its own to compute first."""


class Rehearsing(Protocol):
    """What warming needs of a cluster."""

    def rehearse(
        self, request: EngineCoreRequest, at: Engine | int, to: Engine | int | None
    ) -> asyncio.Future[int]:
        """Prefill a request of our own on `at` and move it to `to`; its output tokens."""
        ...

    def abandon(self, request_id: str, cancelled: bool) -> None:
        """End it."""
        ...


async def warm(cluster: VllmCluster, timeout: float = SECONDS) -> None:
    """Move a request over every ordered pair, twice. Raises StartError naming the pairs that failed."""
    await meet(cluster, cluster.engines, list(permutations(cluster.engines, 2)), timeout)


async def meet(
    cluster: Rehearsing, alone: Sequence[Engine], pairs: Sequence[Pair], timeout: float = SECONDS
) -> None:
    """Have these engines prefill and decode, and these pairs move. Raises StartError naming what failed, and
    LateError where nothing did and something was not over in time."""
    for turn in range(TURNS):
        await _turn(cluster, alone, pairs, turn, timeout)
        if turn == 0:  # the turn after it already takes the way that all others will
            await asyncio.gather(*(engine.look_around() for engine in _engines(alone, pairs)))


# Every rehearsal has a name and a prompt of its own: requests of an earlier life, or of an earlier server,
# may still be known.
_count = itertools.count()
_server = f"{time.time_ns():x}"


async def _turn(
    cluster: Rehearsing, alone: Sequence[Engine], pairs: Sequence[Pair], turn: int, timeout: float
) -> None:
    parts: list[tuple[Engine, Engine | None]] = [*pairs, *((engine, None) for engine in alone)]
    if not parts:
        return
    requests = [_request(a, b or a, turn, logprobs=None if b else LOGPROBS[turn]) for a, b in parts]
    waits = [cluster.rehearse(request, *part) for request, part in zip(requests, parts, strict=True)]
    engines = _engines(alone, pairs)
    try:
        await _settled(waits, engines, timeout)
    except BaseException:  # cancelled
        _abandon(cluster, requests, waits)
        raise
    for engine in engines:
        if not engine.alive:
            raise StartError(
                f"instance {engine.name} ended while it was warmed: {engine.process.cause()}; "
                f"its log is {engine.process.log}"
            )
    well = [wait.done() and wait.result() >= OUTPUT for wait in waits]
    late = [not wait.done() for wait in waits]
    _abandon(cluster, requests, waits)
    bad = [
        f"{a.name} -> {b.name}" if b else a.name for (a, b), good in zip(parts, well, strict=True) if not good
    ]
    if bad:
        logs = ", ".join(str(e.process.log) for e in engines)
        only_late = all(x or y for x, y in zip(well, late, strict=True)) and all(well[len(pairs) :])
        kind = LateError if only_late else StartError
        raise kind(f"no request could be moved within {timeout:g} s: {'; '.join(bad)}; logs are {logs}")


def _abandon(
    cluster: Rehearsing, requests: Sequence[EngineCoreRequest], waits: Sequence[asyncio.Future[int]]
) -> None:
    """End those that are not over."""
    for request, wait in zip(requests, waits, strict=True):
        if not wait.done():
            cluster.abandon(request.request_id, cancelled=False)


def _engines(alone: Sequence[Engine], pairs: Sequence[Pair]) -> list[Engine]:
    return list(dict.fromkeys([*alone, *itertools.chain(*pairs)]))


async def _settled(waits: Sequence[asyncio.Future[int]], engines: list[Engine], timeout: float) -> None:
    """Wait until all are over, somebody dies, or the time is over."""
    for _ in range(round(timeout)):  # seconds, but for those in which this process stood still
        _, pending = await asyncio.wait(waits, timeout=1)
        if not pending or not all(engine.alive for engine in engines):
            return


async def measure(cluster: Rehearsing, engines: Sequence[Engine]) -> None:
    """Prefill two chunks and decode a little on each of these: facts that tell the predictor its speed.

    Without them an instance that no prompt was sent to keeps its default, and if that is worse than what was
    learned about the others, no prompt will ever be sent to it.
    """
    waits = []
    for engine in engines:
        if engine.chunk:
            length = 2 * engine.chunk + 3
            request = _request(engine, engine, MEASURE, length, 8)
            waits.append(cluster.rehearse(request, engine, None))
    if waits:
        await asyncio.wait(waits, timeout=60.0)


async def paced(cluster: VllmCluster, tokens: int) -> tuple[float, float] | None:
    """Seconds that a prompt of so many tokens (or as many as fit) takes, and a step of some decodes: of the
    first instance by itself. None where they were not over in time."""
    engine = cluster.engines[0]
    if not engine.chunk:
        return None
    prompt = await _lasted(cluster, [_request(engine, engine, MEASURE, tokens, OUTPUT)])
    if prompt is None:
        return None
    steps = await _lasted(cluster, [_request(engine, engine, MEASURE, 0, STEPS) for _ in range(DECODES)])
    if steps is None:
        return None
    step = steps / STEPS
    return max(0.0, prompt - (OUTPUT - 1) * step), step


async def _lasted(cluster: VllmCluster, requests: list[EngineCoreRequest]) -> float | None:
    """Seconds until the last of these, all on the first instance, was over."""
    began = time.monotonic()
    waits = [cluster.rehearse(request, 0, None) for request in requests]
    _, pending = await asyncio.wait(waits, timeout=SECONDS)
    for request, wait in zip(requests, waits, strict=True):
        if wait in pending:
            cluster.abandon(request.request_id, cancelled=False)
    return None if pending else time.monotonic() - began


def _request(
    one: Engine,
    other: Engine,
    turn: int,
    length: int = 0,
    output: int = OUTPUT,
    logprobs: int | None = None,
) -> EngineCoreRequest:
    config = one.client.vllm_config
    a, b, number = one.index, other.index, next(_count)
    length = length or BLOCKS * config.cache_config.block_size + 3
    length = min(length, config.model_config.max_model_len - output - 1)
    vocabulary = config.model_config.get_vocab_size()
    # Another prompt for every pair: a block that is cached already would not be pulled.
    step = 1 + a + 2 * b
    tokens = [(1 + turn * 101 + a * 31 + b * 17 + number * 7 + k * step) % vocabulary for k in range(length)]
    params = SamplingParams(
        temperature=0.0, max_tokens=output, min_tokens=output, ignore_eos=True, logprobs=logprobs
    )
    return own_request(f"taichi-warm-{_server}-{number}", tokens, params)


def own_request(name: str, tokens: list[int], params: SamplingParams) -> EngineCoreRequest:
    """A request that no user sent."""
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
