"""What it costs to know what is cached: `pytest -s benchmarks/test_prefixes.py`.

Bounds: 0.3 us for each token of a prompt that the server hashes, and no part of it holds the event loop for
longer than 2 ms; a step in which the prefix cache did not change costs an engine core 1 us more at most; each
block that comes or goes costs less than a quarter of what vLLM's own KV events take for it. Time is the CPU
time of the thread, so that other work on the machine does not count as ours.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from taichi_serve.cluster.vllm.core.cached import CachedBlocks
from taichi_serve.cluster.vllm.server import facts
from taichi_serve.cluster.vllm.server.blocks import Hasher
from taichi_serve.cluster.vllm.server.warm import own_request
from taichi_serve.cluster.vllm.wire import HASH_BYTES, KEY, Caching, Record

BLOCK = 16
PROMPT = [(7919 * k + 11) % 150_000 for k in range(100_000)]
PARAMS = SamplingParams(max_tokens=5)
TIMES = 5


def say(line: str) -> None:
    """A line of the report (`pytest -s` shows it)."""
    sys.stdout.write(f"\n{line}")


def measured(act: Callable[[], object], times: int = TIMES) -> float:
    """Seconds of CPU time, the median of so many."""
    taken = []
    for _ in range(times):
        began = time.thread_time()
        act()
        taken.append(time.thread_time() - began)
    return median(taken)


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
def test_hashing_takes_at_most_so_long_for_a_token(algorithm: str) -> None:
    hasher = Hasher(algorithm, BLOCK)
    request = own_request("a", PROMPT, PARAMS)
    ours = measured(lambda: asyncio.run(hasher.of(request))) / len(PROMPT)
    theirs = get_request_block_hasher(BLOCK, get_hash_fn_by_name(algorithm))
    vllms = measured(lambda: Request.from_engine_core_request(request, theirs)) / len(PROMPT)
    say(f"{algorithm}: {ours * 1e6:.3f} us a token in the server, {vllms * 1e6:.3f} in an engine's request")
    assert algorithm != "sha256" or ours <= 0.3e-6


async def test_a_prompt_of_100000_tokens_never_holds_the_event_loop_for_long() -> None:
    hashing = asyncio.create_task(Hasher("sha256", BLOCK).of(own_request("a", PROMPT, PARAMS)))
    held = []
    while not hashing.done():
        began = time.thread_time()
        await asyncio.sleep(0)
        held.append(time.thread_time() - began)
    say(f"100,000 tokens: {len(held)} turns, {median(held) * 1e3:.2f} ms each, {max(held) * 1e3:.2f} at most")
    assert max(held) <= 0.002


class Cache:
    """A prefix cache into which a prompt's blocks go and come out of again."""

    def __init__(self, blocks: int, events: bool) -> None:
        function = get_hash_fn_by_name("sha256")
        kv_cache_utils.init_none_hash(function)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.manager = KVCacheManager(config, 200_000, BLOCK, BLOCK, enable_kv_cache_events=events)
        scheduler: Any = SimpleNamespace(kv_cache_manager=self.manager, has_requests=lambda: False)
        self.cached = CachedBlocks(scheduler)
        self.blocks = blocks
        prompt = own_request("a", PROMPT[: blocks * BLOCK], PARAMS)
        self.request = Request.from_engine_core_request(prompt, get_request_block_hasher(BLOCK, function))

    def turn(self) -> None:
        """All blocks of the prompt come, and all go."""
        pool = self.manager.block_pool
        blocks = pool.get_new_blocks(self.blocks)
        pool.cache_full_blocks(self.request, blocks, 0, self.blocks, BLOCK, 0)
        self.manager.take_events()
        self.cached.take()
        pool.evict_blocks({block.block_id for block in blocks})
        pool.free_blocks(blocks)
        self.manager.take_events()
        self.cached.take()


def test_noting_what_comes_and_goes_costs_a_fraction_of_kv_events() -> None:
    blocks, took = 4000, {}
    for way in ("nothing", "noting", "events"):
        cache = Cache(blocks, events=way == "events")
        if way == "noting":
            assert cache.cached.follow(kv_cache_utils.NONE_HASH.hex()) == BLOCK
        took[way] = measured(cache.turn) / blocks * 1e6
    ours, vllms = took["noting"] - took["nothing"], took["events"] - took["nothing"]
    say(f"a block that comes and goes: {took['nothing']:.2f} us")
    say(f"to tell of it: {ours:.2f} us more; by vLLM's KV events: {vllms:.2f} us more")
    assert ours <= vllms / 4


def test_a_step_that_changed_nothing_has_nothing_to_tell_and_pays_next_to_nothing() -> None:
    cache = Cache(4000, events=False)
    cache.cached.follow(kv_cache_utils.NONE_HASH.hex())
    cache.cached.take()
    took = measured(lambda: [cache.cached.take() for _ in range(10_000)]) / 10_000 * 1e6
    say(f"a step without a change: {took:.3f} us\n")
    assert took <= 1.0


@pytest.mark.parametrize("blocks", [0, 1, 64, 512])
def test_the_record_of_a_step_grows_with_the_blocks_that_came(blocks: int) -> None:
    caching = Caching(bytes(range(HASH_BYTES)) * blocks) if blocks else None
    record = Record(1.0, 0.01, 1024, 16, 50_000, {}, {}, caching)
    sent = MsgpackEncoder().encode(record)
    raw = MsgpackDecoder().decode(sent)
    engine: Any = SimpleNamespace(name="i0", residents={}, cached_blocks=0, holds=lambda *_: None)

    def heard() -> None:
        stats = SchedulerStats(kv_connector_stats={KEY: raw})
        facts.told(engine, EngineCoreOutputs(scheduler_stats=stats), 1.0)

    times = 2000
    put = measured(lambda: [MsgpackEncoder().encode(record) for _ in range(times)]) / times * 1e6
    took = measured(lambda: [heard() for _ in range(times)]) / times * 1e6
    say(f"{blocks} blocks: {sum(map(len, sent))} bytes, {put:.1f} us to send, {took:.1f} us to hear\n")
    assert took <= 30 + 0.5 * blocks
