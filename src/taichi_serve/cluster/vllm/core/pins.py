"""Blocks that somebody reads while their request still runs: they stay, whatever becomes of the request.

A full block never changes. Pinned, it is not given to anybody else either, even if its request is preempted,
ends or is aborted meanwhile; so a reader cannot meet another request's KV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from taichi_serve.cluster.vllm.core.reads import Reads
from taichi_serve.cluster.vllm.wire import News

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


class Pins:
    """Blocks pinned for every leg that is copied ahead, by that leg: two may read from one request, one after
    the other. Of a followed request, what is full is pinned after each of its steps, unasked: a question
    would be heard when the step after is over, and with it, maybe, the prompt."""

    def __init__(self, manager: KVCacheManager, block_size: int, reads: Reads | None = None) -> None:
        self._manager = manager
        self._reads = Reads() if reads is None else reads
        self._block_size = block_size
        self._blocks: dict[str, dict[int, KVCacheBlock]] = {}
        self._readers: dict[str, str] = {}  # of the requests that are followed
        self._followed: dict[str, str] = {}  # the other way round

    def follow(self, request: Request, reader: str) -> None:
        """From now on, pin for this leg whatever the request has computed."""
        self._readers[request.request_id], self._followed[reader] = reader, request.request_id

    def leave(self, request_id: str) -> None:
        """The request is over; what is pinned stays."""
        if reader := self._readers.pop(request_id, ""):
            self._followed.pop(reader, None)

    def news(self, requests: Iterable[Request]) -> dict[str, News]:
        """Of those of these that are followed, the reader and all full blocks, pinned."""
        found = {}
        for request in requests:
            reader = self._readers.get(request.request_id, "")
            if reader and (blocks := self.pin(request, reader)):
                found[request.request_id] = News(reader, blocks)
        return found

    def pin(self, request: Request, reader: str) -> list[int] | None:
        """Pin what is full by now; the ids of all full blocks. None where the model keeps several kinds of
        KV."""
        groups = self._manager.get_blocks(request.request_id).blocks
        if len(groups) != 1:
            return None
        # Steps that are under way have been counted already, and may not have written their KV yet.
        final = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens - 1)
        count = max(0, final) // self._block_size
        # Nor may a read that is under way have filled its own.
        if (certain := self._reads.certain(request.request_id)) is not None:
            count = min(count, certain)
        full = {block.block_id: block for block in groups[0][:count]}
        if full:
            self.hold(reader, full.values())
        return list(full)

    def hold(self, reader: str, blocks: Iterable[KVCacheBlock]) -> None:
        """Keep these blocks for a reader, beside what it has."""
        pinned = self._blocks.setdefault(reader, {})
        fresh = {block.block_id: block for block in blocks if block.block_id not in pinned}
        self._manager.block_pool.touch(list(fresh.values()))
        pinned |= fresh

    def readers(self) -> list[str]:
        """For whom anything is kept, or will be."""
        return list({**self._blocks, **self._followed})

    def holds(self, reader: str) -> bool:
        """Whether anything is kept for it."""
        return reader in self._blocks

    def unpin(self, reader: str) -> None:
        """They are read no more, and no others will be."""
        if request_id := self._followed.pop(reader, ""):
            self._readers.pop(request_id, None)
        if blocks := self._blocks.pop(reader, None):
            self._manager.block_pool.free_blocks(reversed(blocks.values()))
