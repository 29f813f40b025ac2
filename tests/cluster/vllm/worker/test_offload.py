"""The host tier of a CPU instance: what was stored is what is loaded, into other blocks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from taichi_serve.cluster.vllm.worker.offload import HostWorker


def caches(*sizes: int, groups: tuple[tuple[int, ...], ...] = ((0, 1),)) -> Any:
    """Tensors of six blocks of so many bytes, all of them different."""
    tensors = [torch.arange(6 * size, dtype=torch.int8).view(6, size) + n for n, size in enumerate(sizes)]
    return CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(one, one.shape[1]) for one in tensors],
        group_data_refs=[[CanonicalKVCacheRef(n, sizes[n]) for n in group] for group in groups],
    )


def device(blocks: list[int], *sizes: int) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(
        blocks, group_sizes=sizes or (len(blocks),), block_indices=[0] * (len(sizes) or 1)
    )


def test_blocks_come_back_into_others_and_the_rest_is_left_alone() -> None:
    kv = caches(4, 8)
    worker = HostWorker(kv, 3)
    before = [one.tensor.clone() for one in kv.tensors]
    assert worker.submit_store(7, device([5, 1]), CPULoadStoreSpec([2, 0]))
    assert worker.submit_load(8, CPULoadStoreSpec([0, 2]), device([3, 4]), expedited=True)
    for one, was in zip(kv.tensors, before, strict=True):
        assert one.tensor[3].tolist() == was[1].tolist()
        assert one.tensor[4].tolist() == was[5].tolist()
        assert one.tensor[[0, 1, 2, 5]].tolist() == was[[0, 1, 2, 5]].tolist()


def test_each_job_is_done_once_and_says_how_many_bytes_it_was() -> None:
    worker = HostWorker(caches(4, 8), 3)
    worker.submit_store(7, device([5, 1]), CPULoadStoreSpec([2, 0]))
    worker.wait({7})
    (done,) = worker.get_finished()
    assert (done.job_id, done.success, done.transfer_size) == (7, True, 24)
    assert worker.get_finished() == []


def test_a_group_of_layers_copies_its_own_tensors_only() -> None:
    kv = caches(4, 4, groups=((0,), (1,)))
    worker = HostWorker(kv, 4)
    worker.submit_store(1, device([0, 1, 2], 1, 2), CPULoadStoreSpec([3, 1, 0]))
    worker.submit_load(2, CPULoadStoreSpec([1, 3]), device([4, 5], 1, 1))
    first, second = (one.tensor for one in kv.tensors)
    assert first[4].tolist() == [0, 0, 0, 0], "nobody stored that of the first group"
    assert second[5].tolist() == [0, 0, 0, 0]
    worker.submit_load(3, CPULoadStoreSpec([3, 1]), device([4, 5], 1, 1))
    assert first[4].tolist() == first[0].tolist()
    assert second[5].tolist() == second[1].tolist()
