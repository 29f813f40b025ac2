"""The worker's side of a move: an agent that reads peers on this host directly, and a thread that copies
ahead."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.nixl_utils import NixlWrapper
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from taichi_serve.cluster.vllm.naps import nap_between_looks
from taichi_serve.cluster.vllm.nothing import NOTHING
from taichi_serve.cluster.vllm.sockets import dress_peers
from taichi_serve.cluster.vllm.wire import Orders
from taichi_serve.cluster.vllm.worker.copier import Copier
from taichi_serve.cluster.vllm.worker.host import HostAgent, Memory
from taichi_serve.cluster.vllm.worker.parent import die_with_core
from taichi_serve.cluster.vllm.worker.seeds import draw_nothing_to_take_back

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Microseconds that NIXL's progress thread sleeps for at most when nothing happens; an event wakes it at once.
PROGRESS_DELAY = 10_000
GPU_PROGRESS_DELAY = 1_000

# Steps after which it is looked at least once what peers say: what they say out of turn does not pile up, and
# who has gone is forgotten.
LOOK_AT_LEAST = 100

# Seconds that a step waits at most for the last blocks of a leg; they are on their way before it begins.
TAIL_SECONDS = 1.0


def let_progress_sleep(bindings: Any, at_most: int) -> None:
    """Have the agents that NIXL makes from now on wait for events, `at_most` so many microseconds, instead of
    looking for them all the time.

    NIXL's Python API sets the delay of its progress thread to 0 and takes no other value: the thread spins.
    It would take a core from every instance, an idle one too; on a CPU instance half of the model's own.
    """
    stock = bindings.nixlAgentConfig

    if hasattr(stock, "__wrapped__"):
        return

    def delay(config: Any) -> int:
        return int(stock.pthrDelay.__get__(config))

    def set_delay(config: Any, delay: int) -> None:
        stock.pthrDelay.__set__(config, delay or at_most)

    members = {"__wrapped__": stock, "pthrDelay": property(delay, set_delay)}
    bindings.nixlAgentConfig = type("PatientAgentConfig", (stock,), members)


class Transferring:
    """One transfer of an agent. One that failed may still write until its handle could be released."""

    def __init__(self, agent: Any, handle: Any) -> None:
        self._agent, self._handle = agent, handle
        self._wrong = ""
        try:
            agent.transfer(handle)
        except Exception as wrong:  # noqa: BLE001 - NIXL's own errors have no common class
            self._wrong = repr(wrong)

    def over(self) -> bool:
        """Whether nothing is written any more. Raises OSError then where not all was read."""
        if not self._wrong:
            try:
                state = self._agent.check_xfer_state(self._handle)
            except Exception as wrong:  # noqa: BLE001
                state = repr(wrong)
            if state == "PROC":
                return False
            if state == "DONE":
                self._agent.release_xfer_handle(self._handle)
                return True
            self._wrong = state
        try:
            self._agent.release_xfer_handle(self._handle)
        except Exception:  # noqa: BLE001
            return False  # it is tried again at the next look
        raise OSError(f"the transfer ended as {self._wrong}")


class FlowConnectorWorker(NixlPullConnectorWorker):
    """The worker's side of the pull, whose agent reads peers on this host directly."""

    nixl_wrapper: Any

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        die_with_core()
        delay = PROGRESS_DELAY if current_platform.is_cpu() else GPU_PROGRESS_DELAY
        let_progress_sleep(sys.modules[NixlWrapper.__module__].nixlBind, delay)
        if current_platform.is_cpu():
            draw_nothing_to_take_back(GPUModelRunner)
            nap_between_looks(shm_broadcast)
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        # vLLM binds this thread, which also runs the model, to the last core: the same for every instance.
        os.sched_setaffinity(0, cores)
        settings = self.kv_transfer_config.get_from_extra_config
        self._host: HostAgent | None = None
        self._copier: Copier | None = None
        self._unseen = 0  # steps since it was last looked what transfers did
        self._in_step: set[str] = set()  # requests whose KV is read within the step they are in
        if directory := settings("taichi_directory", ""):
            dress_peers(Path(directory), engine_id)
            memory = _memory() if settings("taichi_direct", True) else None
            me = (engine_id, self.tp_rank)
            self.nixl_wrapper = self._host = HostAgent(self.nixl_wrapper, Path(directory), memory, *me)
            self._host.knows = lambda request: (
                request in self._reqs_to_send or request in self._reqs_to_process
            )
            self._copier = Copier(Path(directory), *me, self)

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        """vLLM's own, with orders to the thread that copies beside the steps. A leg whose last block should
        be here by now is waited for; where it is not, nothing that was read for the leg counts."""
        if metadata is NOTHING and self._ready_requests.empty():
            return
        super().start_load_kv(metadata)
        orders = getattr(metadata, "taichi", None) or Orders()
        if self._copier is None:
            return
        if orders.copier:
            self._copier.order(*orders.copier)
        for given in orders.awaited:
            if not self._copier.wait(given.leg, TAIL_SECONDS):
                self._invalid_block_ids.put(set(given.blocks[given.first :]))

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        """Give back what the server said to release (FlowConnectorScheduler.release): nothing else expires.
        vLLM's own would warn of each, and count it as KV that was lost."""
        now = time.perf_counter()
        for leg in [leg for leg, until in self._reqs_to_send.items() if now >= until]:
            self.consumer_notification_counts_by_req.pop(leg, None)
            self.expected_consumer_notifications_by_req.pop(leg, None)
            self._reqs_to_process.discard(leg)
            del self._reqs_to_send[leg]
            done_sending.add(leg)

    def read(self, source: str, remote: list[int], local: list[int], note: str) -> Callable[[], bool]:
        """Read blocks of a peer from whatever thread; see copier.Reader. The peer is told `note`
        afterwards."""
        plan, info = self.tp_mappings[source], self.transfer_topo.get_engine_info(source)
        (rank,) = plan.all_source_ranks
        word = f"{note}:{plan.local_consumers}".encode() if note else b""
        if not local:
            self.nixl_wrapper.send_notif(self._remote_agents[source][0, rank], notif_msg=word)
            return lambda: True
        there = self._rows(source, remote, info.remote_physical_blocks_per_logical)
        here = self._rows(self.engine_id, local, self._physical_blocks_per_logical_kv_block)
        agent = self.nixl_wrapper
        mine, theirs = self.src_xfer_handles_by_block_size[info.remote_block_size], self.dst_xfer_side_handles
        handle = agent.make_prepped_xfer("READ", mine, here, theirs[source][rank], there, notif_msg=word)
        return Transferring(agent, handle).over

    def forget(self, source: str) -> None:
        """A peer is lost; see copier.Reader."""
        assert self._host is not None
        self._host.forget(source)

    def _rows(self, engine: str, blocks: list[int], ratio: int) -> NDArray[np.int64]:
        """The descriptors of these blocks in an engine's prepared list."""
        rows: NDArray[np.int64] = self._compute_desc_ids(
            block_ids=self._logical_to_kernel_block_ids([blocks], ratio),
            dst_num_blocks=self.dst_num_blocks[engine],
            block_size_ratio=None,
            physical_blocks_per_logical=ratio,
        )
        return rows

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        """Read now, within the step, what the scheduler counts on; everything else as vLLM does."""
        assert meta.remote is not None
        if meta.awaiting_kvs or not any(meta.local_block_ids) or self._host is None:
            super()._read_blocks_for_req(req_id, meta)
        elif meta.remote.engine_id in self._remote_agents:
            self._in_step.add(req_id)
            with self._host.within_step():
                super()._read_blocks_for_req(req_id, meta)
        else:  # the peer was forgotten in between: have the tokens computed again
            self._recving_metadata.pop(req_id, None)
            self._invalid_block_ids.put(set(meta.local_block_ids[0]))

    def get_transfer_results(self) -> KVConnectorTransferResults:
        """Requests that were read within their step are not waited for by the scheduler.

        Looking takes NIXL and vLLM 80 us, at every step; it is only done where there is something to see.
        """
        self._unseen += 1
        if self._reads_or_holds() or self._unseen >= LOOK_AT_LEAST:
            self._unseen, results = 0, super().get_transfer_results()
        else:
            results = KVConnectorTransferResults()
        over = results.finished_recving & self._in_step
        results.finished_recving -= over
        results.failed_recving -= over
        self._in_step -= over
        if self._copier is not None:
            results.finished_recving |= self._copier.returned()
        return results

    def _reads_or_holds(self) -> bool:
        """Whether anything is read from a peer, or held for one."""
        reads = self._recving_metadata or self._recving_transfers or self._recv_failures
        return bool(
            reads or self._reqs_to_send or self._reqs_to_process or not self._failed_recv_reqs.empty()
        )


def _memory() -> Memory | None:
    if current_platform.is_cpu():
        from taichi_serve.cluster.vllm.worker.process_memory import CpuMemory

        return CpuMemory()
    if current_platform.is_cuda():
        from taichi_serve.cluster.vllm.worker.cuda_ipc import CudaMemory

        return CudaMemory()
    return None
