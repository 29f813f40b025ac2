"""Every ordered pair of instances moves one small request before the server says it is ready.

NIXL's first pull between two instances makes a handshake of one to several seconds; no user should wait
for it. It also shows that the pair can move KV at all.
"""

from __future__ import annotations

import asyncio
import time
from itertools import permutations

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.process import StartError

BLOCKS = 2
MEASURE = 9  # a turn of its own: other prompts than in the turns before


async def warm(cluster: VllmCluster, timeout: float = 180.0) -> None:
    """Move a request over every ordered pair, twice: the first meeting of a pair goes another way than all
    that follow. Raises StartError naming the pairs that failed."""
    for turn in range(2):
        await _all_pairs(cluster, turn, timeout)


async def _all_pairs(cluster: VllmCluster, turn: int, timeout: float) -> None:
    pairs = {
        (a.name, b.name): cluster.rehearse(_request(cluster, a.index, b.index, turn), a.index, b.index)
        for a, b in permutations(cluster.engines, 2)
    }
    alone = [
        cluster.rehearse(_request(cluster, e.index, e.index, turn), e.index, None) for e in cluster.engines
    ]
    waits = [*pairs.values(), *alone]
    if not waits:
        return
    await asyncio.wait(waits, timeout=timeout)
    bad = [f"{a} -> {b}" for (a, b), wait in pairs.items() if not wait.done() or wait.result() < 2]
    bad += [e.name for e, wait in zip(cluster.engines, alone, strict=True) if not wait.done()]
    for engine in cluster.engines:
        if not engine.alive:
            raise StartError(
                f"instance {engine.name} ended while it was warmed: {engine.process.cause()}; "
                f"its log is {engine.process.log}"
            )
    if bad:
        logs = ", ".join(str(e.process.log) for e in cluster.engines)
        raise StartError(f"no request could be moved within {timeout:g} s: {'; '.join(bad)}; logs are {logs}")


async def measure(cluster: VllmCluster) -> None:
    """Prefill two chunks and decode a little on every instance: facts that tell the predictor its speed.

    Without them an instance that no prompt was sent to keeps its default, and if that is worse than what was
    learned about the others, no prompt will ever be sent to it.
    """
    waits = []
    for engine in cluster.engines:
        if engine.chunk:
            length = 2 * engine.chunk + 3
            request = _request(cluster, engine.index, engine.index, MEASURE, length, 8)
            waits.append(cluster.rehearse(request, engine.index, None))
    if waits:
        await asyncio.wait(waits, timeout=60.0)


def _request(
    cluster: VllmCluster, a: int, b: int, turn: int, length: int = 0, output: int = 2
) -> EngineCoreRequest:
    config = cluster.engines[a].client.vllm_config
    length = length or BLOCKS * config.cache_config.block_size + 3
    length = min(length, config.model_config.max_model_len - output - 1)
    vocabulary = config.model_config.get_vocab_size()
    # Another prompt for every pair: a block that is cached already would not be pulled.
    tokens = [(1 + turn * 101 + a * 31 + b * 17 + k * (1 + a + 2 * b)) % vocabulary for k in range(length)]
    params = SamplingParams(temperature=0.0, max_tokens=output, min_tokens=output, ignore_eos=True)
    return own_request(f"taichi-warm-{turn}-{a}-{b}", tokens, params)


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
