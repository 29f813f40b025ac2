"""The host tier of a pretended instance: vLLM's own side of it in a worker, and copies that are pretended.

On a GPU a copy takes place at any time between when it is submitted and when somebody waits for it, those of
one direction in the order in which they were submitted. Here it takes place when it ends, the worst moment.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult


class PretendedCopies(OffloadingWorker):
    """Copies lists of hashes between the slots of an instance and chunks of its host."""

    def __init__(self, here: Any) -> None:
        self.here = here
        self.chunks: dict[int, list[int]] = {}
        self.stores: deque[tuple[int, list[int], list[int]]] = deque()  # job, from, to
        self.loads: deque[tuple[int, list[int], list[int]]] = deque()
        self.done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.stores.append((job_id, list(map(int, src_spec.block_ids)), list(map(int, dst_spec.block_ids))))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.loads.append((job_id, list(map(int, src_spec.block_ids)), list(map(int, dst_spec.block_ids))))
        return True

    def get_finished(self) -> list[TransferResult]:
        for queue in (self.stores, self.loads):
            while queue and self.here.chance.random() < 0.5:
                self._copy(queue)
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        for queue in (self.stores, self.loads):
            while any(job in job_ids for job, _, _ in queue):
                self._copy(queue)
                self.here._count("waited for")

    def _copy(self, queue: deque[tuple[int, list[int], list[int]]]) -> None:
        job, sources, targets = queue.popleft()
        nothing = [0] * 16
        for source, target in zip(sources, targets, strict=True):
            if queue is self.stores:
                self.chunks[target] = list(self.here.slots.get(source, nothing))
            else:
                self.here.slots[target] = list(self.chunks.get(source, nothing))
        self.here._count("stored" if queue is self.stores else "loaded")
        self.done.append(TransferResult(job, True, 1, 1.0))


class PretendedHost:
    """What the connector of a worker does for it, step by step."""

    def __init__(self, here: Any) -> None:
        connector = here.scheduler.connector._connectors[1]
        spec: Any = SimpleNamespace(replicated_layout=False)
        self.copies = PretendedCopies(here)
        self.worker = OffloadingConnectorWorker(spec, connector._vllm_config, connector._kv_cache_config)
        self.worker.worker = self.copies

    def before(self, meta: Any) -> None:
        """Before anything of the step."""
        self.worker.handle_preemptions(meta)

    def load(self, meta: Any) -> None:
        """Before what is computed in the step, or after it."""
        self.worker.start_kv_transfers(meta)

    def after(self, meta: Any) -> tuple[set[str], Any]:
        """At its end: for whom KV has come, and what the core is told."""
        self.worker.prepare_store_kv(meta)
        _, received = self.worker.get_finished(set())
        told = self.worker.build_connector_worker_meta()
        return received, None if told is None else MultiKVConnectorWorkerMetadata((None, told))
