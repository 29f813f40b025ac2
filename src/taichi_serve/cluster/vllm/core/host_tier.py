"""The engine core's side of offloading KV to the host, which is vLLM's: what of it moves would make wrong.

- Blocks of a leg into which KV is being read are not stored before it is certain what is in them (reads.py).
- A block that is given to a leg of ours is written into by others than the step. So what is still to be
  stored of its old content is stored before; of requests that are scheduled vLLM sees to that itself.
- A load from the host is a read like any other: whoever drops its request has no answer before it is over.

What the host holds is told with each step, as what the device holds is (cached.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import RequestStatus

from taichi_serve.cluster.vllm.wire import HASH_BYTES, Caching, Given

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
    from vllm.v1.request import Request

    from taichi_serve.cluster.vllm.core.reads import Reads


class HostTier:
    """Stands before the scheduler's side of vLLM's offloading."""

    def __init__(self, connector: OffloadingConnector, reads: Reads, block_size: int) -> None:
        self._connector = connector
        self._scheduler = connector.scheduler
        self._reads = reads
        self._block_size = block_size
        self.blocks = HostBlocks(connector.scheduler.manager)
        # Requests that are there to load and must not be computed (loans.py): whether they were looked at.
        self.only_loads: dict[str, bool] = {}

    def has(self, block_hash: bytes) -> bool:
        """Whether the host has this block, complete."""
        chunk = self.blocks.manager._policy.get(make_offload_key(block_hash, 0))
        return chunk is not None and bool(chunk.is_ready)

    @property
    def just_reset(self) -> bool:
        """Whether the tier was emptied since the last step, and its workers are still to hear of it."""
        return bool(self._scheduler._current_batch_jobs_to_flush)

    def matched(self, request: Request, known: int) -> tuple[int | None, bool]:
        """Tokens that the host has beyond the `known` ones, and whether to wait for them outside the step;
        None where that is not known yet. The last token is computed in any case, into a block that nobody
        else has."""
        whole = (request.num_tokens - 1) // self._block_size * self._block_size
        most = max(0, whole - known)
        if (theirs := self._connector._max_loadable_tokens(request, known)) is not None:
            most = min(most, theirs)
        tokens, later = self._scheduler.get_num_new_matched_tokens(request, known, most)
        if request.request_id in self.only_loads:
            self.only_loads[request.request_id] = True
            return tokens or None, later
        return tokens, later

    def loads(self, request: Request, blocks: KVCacheBlocks) -> None:
        """KV is read from the host into these blocks of a request."""
        leg = request.request_id
        first = self._scheduler._req_status[leg].num_locally_computed_tokens // self._block_size
        self._reads.begin(Given(leg, list(blocks.get_block_ids()[0]), first))

    def given_away(self, blocks: KVCacheBlocks) -> None:
        """KV of a peer is read into blocks of a request that is not in this step, or before it begins."""
        for group in blocks.get_block_ids():
            self._scheduler._current_batch_allocated_block_ids.update(group)

    def bound(self, legs: Iterable[str]) -> None:
        """Of these legs, which are about to be looked at, no more is stored than what is certain by now."""
        for leg in legs:
            status = self._scheduler._req_status.get(leg)
            if status is not None:
                certain = self._reads.certain(leg)
                status.max_offload_tokens = None if certain is None else certain * self._block_size

    def ends(self, request: Request) -> None:
        """So it stays when the request ends, and what went wrong leaves nothing behind."""
        status = self._scheduler._req_status.get(request.request_id)
        self.bound((request.request_id,))
        if status is not None and request.status == RequestStatus.FINISHED_ERROR:
            status.max_offload_tokens = 0


class HostBlocks:
    """What is still to be told of the host's blocks. Nothing is noted before somebody asks for it; everything
    is told anew where they ask again, and where the tier was emptied."""

    def __init__(self, manager: CPUOffloadingManager) -> None:
        self.manager = manager
        self._followed = False
        self.anew = False

    def follow(self) -> None:
        """Tell what is there from the next record on, all of it in that one."""
        self._followed = self.anew = True
        self.manager.events = []

    def forget(self) -> None:
        """The tier was emptied."""
        if self._followed:
            self.follow()

    def take(self) -> Caching | None:
        """What came and went since the last time; None where nothing did."""
        if not self._followed:
            return None
        came: dict[bytes, None] = {}
        went: dict[bytes, None] = {}
        for event in self.manager.take_events():
            to, back = (went, came) if event.removed else (came, went)
            for key in event.keys:
                if key in back:
                    del back[key]
                else:
                    to[key] = None
        if self.anew:
            self.anew = False
            chunks = self.manager._policy.chunks.items()
            return Caching(_packed(key for key, chunk in chunks if chunk.is_ready), b"", True)
        return Caching(_packed(came), _packed(went)) if came or went else None


def _packed(keys: Iterable[bytes]) -> bytes:
    return b"".join([key[:HASH_BYTES] for key in keys])
