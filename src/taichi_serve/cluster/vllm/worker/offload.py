"""Copies blocks of KV between the cache of a CPU instance and its host tier.

vLLM submits a store or a load when nothing else works on these blocks: a store in the step after the one that
filled them, a load before the one that needs them. So each is done when it is submitted.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_offload.base import BlockIDsLoadStoreSpec, GPULoadStoreSpec, OffloadingWorker, TransferResult

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import CanonicalKVCaches, LoadStoreSpec


class HostWorker(OffloadingWorker):
    """One worker's part of the host tier: `chunks` blocks of every tensor."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._groups = kv_caches.group_data_refs
        self._device = [one.tensor.view(-1, one.page_size_bytes) for one in kv_caches.tensors]
        # Memory is taken as it is written to.
        self._host = [torch.zeros((chunks, one.shape[1]), dtype=one.dtype) for one in self._device]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Copy blocks to the host tier."""
        return self._copy(job_id, self._device, self._host, src_spec, dst_spec, src_spec)

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """Copy them back; none waits for another, so `expedited` (vLLM 0.33) says nothing new."""
        return self._copy(job_id, self._host, self._device, src_spec, dst_spec, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        """What was copied since the last time."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def _copy(
        self,
        job_id: int,
        source: list[torch.Tensor],
        target: list[torch.Tensor],
        src_spec: LoadStoreSpec,
        dst_spec: LoadStoreSpec,
        blocks: GPULoadStoreSpec,
    ) -> bool:
        assert isinstance(src_spec, BlockIDsLoadStoreSpec) and isinstance(dst_spec, BlockIDsLoadStoreSpec)
        began, copied, first = time.perf_counter(), 0, 0
        for refs, count in zip(self._groups, blocks.group_sizes, strict=True):
            here = torch.from_numpy(src_spec.block_ids[first : first + count]).long()
            there = torch.from_numpy(dst_spec.block_ids[first : first + count]).long()
            first += count
            for number in {ref.tensor_idx for ref in refs} if count else ():
                target[number][there] = source[number][here]
                copied += count * source[number].shape[1]
        self._done.append(TransferResult(job_id, True, copied, time.perf_counter() - began))
        return True
