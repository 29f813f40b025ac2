"""vLLM's offloading of KV to memory of the host, on machines without a GPU.

All of it is vLLM's but for one thing: the workers that it brings copy between a GPU and its host, and on a
CPU it refuses to make one. There, KV lies in memory of the host anyway, and a second tier is of no use but to
see that everything around it is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker


class HostSpec(CPUOffloadingSpec):
    """vLLM's own, with a worker for a CPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The one worker of this process."""
        from taichi_serve.cluster.vllm.worker.offload import HostWorker

        return HostWorker(kv_caches, self.num_chunks)
