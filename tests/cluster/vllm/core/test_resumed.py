"""Requests that began elsewhere, and blocks that stay while they are read: vLLM's own request and block
pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request

from taichi_serve.cluster.vllm.core.pins import Pins
from taichi_serve.cluster.vllm.core.resumed import go_on, keep_room
from taichi_serve.cluster.vllm.wire import KEY

BLOCK = 4


def request(tokens: int) -> Request:
    """A leg that is copied ahead, with two of its tokens made so far, at most 10 more and at least 3."""
    params = SamplingParams(max_tokens=10, min_tokens=3, extra_args={KEY: {"output": 2, "ahead": 8}})
    return Request("a#1+", list(range(tokens)), params, None)


def test_room_is_kept_for_tokens_that_are_not_there_yet_and_gone_when_they_are() -> None:
    moving = request(6)
    keep_room(moving, 8)
    assert (moving.num_tokens, moving.num_prompt_tokens) == (14, 6)
    go_on(moving, [50, 51], v2=False)
    assert list(moving.all_token_ids) == [0, 1, 2, 3, 4, 5, 50, 51]
    # The V1 runner takes what came since as prompt: as much less may come.
    assert (moving.num_prompt_tokens, moving.max_tokens) == (8, 8)
    assert moving.sampling_params is not None
    assert moving.sampling_params.min_tokens == 1


def test_the_v2_runner_is_told_that_it_is_output() -> None:
    moving = request(6)
    keep_room(moving, 8)
    go_on(moving, [50, 51], v2=True)
    assert (list(moving.output_token_ids), moving.num_prompt_tokens, moving.max_tokens) == ([50, 51], 6, 10)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(num_gpu_blocks=9, enable_caching=False, hash_block_size=BLOCK)


def running(pool: BlockPool, blocks: int, tokens: int, in_flight: int) -> tuple[SimpleNamespace, Pins]:
    """A request with so many blocks and tokens, some of them of steps that are not over."""
    mine = pool.get_new_blocks(blocks)
    manager = SimpleNamespace(get_blocks=lambda name: SimpleNamespace(blocks=(mine,)), block_pool=pool)
    here = {"num_computed_tokens": tokens, "num_in_flight_tokens": in_flight, "num_tokens": tokens + 1}
    return SimpleNamespace(request_id="a", blocks=mine, **here), Pins(manager, BLOCK)  # type: ignore[arg-type]


def test_full_blocks_stay_when_their_request_has_gone(pool: BlockPool) -> None:
    before = pool.get_num_free_blocks()
    one, pins = running(pool, blocks=3, tokens=11, in_flight=0)
    assert pins.pin(one, "a#1+") == [block.block_id for block in one.blocks[:2]]  # type: ignore[arg-type]
    pool.free_blocks(reversed(one.blocks))
    assert pool.get_num_free_blocks() == before - 2
    pins.unpin("a#1+")
    pins.unpin("a#1+")
    assert pool.get_num_free_blocks() == before


def test_a_block_that_a_step_under_way_still_fills_is_not_full(pool: BlockPool) -> None:
    one, pins = running(pool, blocks=3, tokens=8, in_flight=1)
    assert pins.pin(one, "a#1+") == [one.blocks[0].block_id]  # type: ignore[arg-type]


def test_pinning_again_adds_what_is_full_since(pool: BlockPool) -> None:
    before = pool.get_num_free_blocks()
    one, pins = running(pool, blocks=3, tokens=4, in_flight=0)
    assert len(pins.pin(one, "a#1+") or ()) == 1  # type: ignore[arg-type]
    one.num_computed_tokens, one.num_tokens = 12, 13
    assert len(pins.pin(one, "a#1+") or ()) == 3  # type: ignore[arg-type]
    pool.free_blocks(reversed(one.blocks))
    pins.unpin("a#1+")
    assert pool.get_num_free_blocks() == before


def test_of_a_followed_request_every_step_pins_what_is_full_until_nobody_reads_it(pool: BlockPool) -> None:
    before = pool.get_num_free_blocks()
    one, pins = running(pool, blocks=3, tokens=11, in_flight=7)
    first, second, _ = (block.block_id for block in one.blocks)
    assert pins.news([one]) == {}  # type: ignore[list-item]  # nobody reads it
    pins.follow(one, "a#1+")  # type: ignore[arg-type]
    assert pins.news([one]) == {"a": ("a#1+", [first])}  # type: ignore[list-item]
    one.num_in_flight_tokens = 0
    assert pins.news([one]) == {"a": ("a#1+", [first, second])}  # type: ignore[list-item]
    pins.unpin("a#1+")
    assert pins.news([one]) == {}  # type: ignore[list-item]
    pool.free_blocks(reversed(one.blocks))
    assert pool.get_num_free_blocks() == before


def test_what_a_followed_request_leaves_behind_stays_pinned(pool: BlockPool) -> None:
    before = pool.get_num_free_blocks()
    one, pins = running(pool, blocks=3, tokens=11, in_flight=0)
    pins.follow(one, "a#1+")  # type: ignore[arg-type]
    pins.news([one])  # type: ignore[list-item]
    pins.leave("a")
    pool.free_blocks(reversed(one.blocks))
    assert pool.get_num_free_blocks() == before - 2
    pins.unpin("a#1+")
    assert pool.get_num_free_blocks() == before
