"""Kinds of KV that move exactly, and those that stay: a table with a row for each kind that vLLM has."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from random import Random

import torch
from flowbench import BLOCK, Instance, Stream, request, scheduler
from vllm.v1 import kv_cache_interface
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)

from taichi_serve.cluster.vllm.core.groups import KINDS, UNKNOWN, stays
from taichi_serve.cluster.vllm.wire import Marks

SHAPE: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=64)


def config(*specs: KVCacheSpec, tensors: tuple[KVCacheTensor, ...] = ()) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=list(tensors), kv_cache_groups=groups)


def kinds(root: type) -> set[str]:
    return {root.__name__}.union(*(kinds(one) for one in root.__subclasses__()))


def test_every_kind_of_kv_that_vllm_has_is_in_the_table() -> None:
    assert kv_cache_interface.KVCacheSpec is KVCacheSpec
    mine = {name for name in kinds(KVCacheSpec) if hasattr(kv_cache_interface, name)}
    assert mine == set(KINDS)


def test_only_plain_full_attention_moves() -> None:
    assert {name for name, why in KINDS.items() if why is None} == {"FullAttentionSpec"}
    assert stays(config(FULL)) == []


def test_windows_without_the_hybrid_manager_keep_all_blocks_and_move() -> None:
    assert stays(config(FullAttentionSpec(**SHAPE, sliding_window=64))) == []


def test_windows_with_blocks_of_their_own_stay() -> None:
    found = stays(config(FULL, WINDOW))
    assert found[0] == "the model's KV is of 2 groups, not of one"
    assert found[1].startswith("SlidingWindowSpec: ")


def test_a_model_without_kv_stays() -> None:
    assert stays(config()) == ["the model's KV is of 0 groups, not of one"]


def test_what_a_later_vllm_brings_stays_whatever_it_is_made_from() -> None:
    class Later(FullAttentionSpec):
        pass

    assert stays(config(Later(**SHAPE))) == [f"Later: {UNKNOWN}"]


def test_layers_of_different_shapes_are_given_away_by_where_they_lie() -> None:
    tensors = (KVCacheTensor(64, ["a"], 32, 32), KVCacheTensor(64, ["b"], 16, 16))
    assert stays(config(FULL, tensors=tensors))[0].startswith("UniformTypeKVCacheSpecs: ")
    assert stays(config(FULL, tensors=tensors[:1])) == []


def test_an_engine_whose_kv_stays_gives_nothing_away_whoever_asks() -> None:
    instance = Instance(0, Random(1), {"a": Stream([7] * 40)})
    engine = instance.scheduler
    engine._side.stays = ["MambaSpec"]
    engine.add_request(request("a", [7] * 40, 4, Marks(hand_over=True)))
    engine.add_request(request("b#1+", [7] * 40, 4, Marks(moved=True, output=1, ahead=8)))
    engine.leave(["a"])
    assert engine.pin("a", "a#1+") is None
    assert not engine.arrive("b#1+", [])
    outputs = instance.run(lambda: not engine.has_requests())
    assert {output.request_id for output in outputs} == {"a"}
    assert sum(len(output.new_token_ids) for output in outputs) == 4


def test_the_scheduler_says_why() -> None:
    assert scheduler().stays == []
