"""What a prefix cache holds is told once when it comes and once when its last copy is gone."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import msgspec
import torch
from flowbench import BLOCK, Instance, Stream, abort, first_hash, request, scheduler, told
from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from taichi_serve.cluster.vllm.core.cached import CachedBlocks
from taichi_serve.cluster.vllm.server.facts import hashes
from taichi_serve.cluster.vllm.wire import Caching, Record

PROMPT = list(range(100, 100 + 2 * BLOCK + 3))
SHAPE: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}


class Here:
    """One instance that computes prompts for one token each, and everything that its records told."""

    def __init__(self, *names: str) -> None:
        self.instance = Instance(0, Random(1), {name: Stream(PROMPT) for name in names}, chunk=128)
        self.scheduler = self.instance.scheduler

    def compute(self, *names: str, most: int = 1) -> None:
        for name in names:
            self.scheduler.add_request(request(name, PROMPT, most))
        self.instance.run(lambda: not self.scheduler.requests and not self.instance.steps)

    def told(self) -> list[Caching]:
        found, self.instance.told = self.instance.told, []
        return found


def test_a_full_block_is_told_with_the_step_that_it_was_given_out_for() -> None:
    here = Here("a")
    here.compute("a")
    anew, *rest = here.told()
    assert anew.reset
    assert hashes(anew.stored) == tuple(told(h) for h in request("a", PROMPT, 1).block_hashes)
    assert len(hashes(anew.stored)) == 2  # the third block has 3 tokens
    assert rest == []


def test_two_copies_of_a_block_are_told_once_and_gone_with_the_last() -> None:
    here = Here("a", "b")
    for name in "ab":  # side by side: none finds the blocks of the other
        one = request(name, PROMPT, 1)
        one.skip_reading_prefix_cache = True
        here.scheduler.add_request(one)
    here.instance.plan()
    (a,), (b,) = (here.scheduler.kv_cache_manager.get_block_ids(name) for name in "ab")
    assert not set(a) & set(b)
    here.instance.take_in()
    (change,) = here.told()
    stored = [told(h) for h in request("a", PROMPT, 1).block_hashes]
    assert list(hashes(change.stored)) == stored
    pool = here.scheduler.kv_cache_manager.block_pool
    pool.evict_blocks(set(a[:2]))
    assert here.scheduler.cached.take() is None
    pool.evict_blocks(set(b[:2]))
    assert here.scheduler.cached.take() == Caching(b"", change.stored)


def test_what_came_and_went_between_two_records_is_not_told() -> None:
    here = Here("a")
    here.compute("a")
    here.told()
    pool = here.scheduler.kv_cache_manager.block_pool
    one = request("b", [9] * BLOCK, 1)
    block = pool.get_new_blocks(1)
    pool.cache_full_blocks(one, block, 0, 1, BLOCK, 0)
    pool.evict_blocks({block[0].block_id})
    assert here.scheduler.cached.take() is None


def test_nothing_is_noted_before_somebody_asks() -> None:
    made = scheduler()
    assert type(made.kv_cache_manager.block_pool.cached_block_hash_to_block) is BlockHashToBlockMap
    assert made.cached.take() is None
    assert not made.has_requests()


def test_who_asks_again_hears_everything_from_the_beginning() -> None:
    here = Here("a")
    here.compute("a")
    here.told()
    assert here.scheduler.cached.follow(first_hash()) == BLOCK
    assert here.scheduler.has_requests()  # an idle engine makes a step to say it
    here.instance.run(lambda: not here.scheduler.has_requests() and not here.instance.steps)
    (all_of_it,) = here.told()
    assert all_of_it.reset
    assert len(hashes(all_of_it.stored)) == 2


def test_an_idle_engine_whose_cache_was_reset_makes_one_step_to_say_so() -> None:
    here = Here("a")
    here.compute("a")
    here.told()
    assert not here.scheduler.has_requests()
    assert here.scheduler.reset_prefix_cache()
    here.instance.run(lambda: not here.scheduler.has_requests() and not here.instance.steps)
    assert here.told() == [Caching(b"", b"", True)]


def test_an_aborted_prompt_leaves_its_full_blocks_in_the_cache() -> None:
    here = Here("a")
    here.scheduler.add_request(request("a", PROMPT, 5))
    here.instance.plan()
    abort(here.instance, "a")
    here.instance.take_in()
    (anew,) = here.told()
    assert len(hashes(anew.stored)) == 2


def test_other_hashes_are_not_told() -> None:
    why = Here("a").scheduler.cached.follow("00" * 32)
    assert isinstance(why, str)
    assert "PYTHONHASHSEED" in why


@pytest.mark.parametrize(
    ("specs", "caching", "why"),
    [
        ([FullAttentionSpec(**SHAPE)], False, "off"),
        (
            [FullAttentionSpec(**SHAPE), SlidingWindowSpec(**SHAPE, sliding_window=64)],
            True,
            "not of one group",
        ),
        ([SlidingWindowSpec(**SHAPE, sliding_window=64)], True, "not of one group with full attention"),
    ],
)
def test_a_cache_whose_blocks_say_little_is_not_told(specs: list[Any], caching: bool, why: str) -> None:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=64,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=caching,
    )
    made: Any = SimpleNamespace(kv_cache_manager=manager, has_requests=lambda: False, connector=None)
    cached = CachedBlocks(made)
    assert why in str(cached.follow(first_hash()))
    assert cached.take() is None
    assert not made.has_requests()


def test_a_record_crosses_the_wire_as_it_is() -> None:
    caching = Caching(b"\x00\xff" * 8, b"12345678", True)
    record = Record(1.0, 0.1, 16, 0, 16, {}, {}, caching)
    raw = MsgpackDecoder().decode(MsgpackEncoder().encode({"taichi": record}))
    assert msgspec.convert(raw["taichi"], Record) == record
    assert hashes(caching.removed) == (int.from_bytes(b"12345678", "little"),)
