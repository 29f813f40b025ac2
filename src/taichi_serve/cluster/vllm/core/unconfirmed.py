"""No block whose content is not certain is in the prefix cache.

vLLM caches blocks when they are given out, in the belief that the step will fill them, or when its connector
says that they came. A leg that is read within its step, or whose last blocks the step waits for, may yet turn
out not to have been read; by then somebody else could have found its blocks in the cache and gone on from
them. So while a leg is in the book of reads its blocks are left out of the cache. vLLM counts what it has
cached of a request and catches up by itself at the next token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.request import Request

    from taichi_serve.cluster.vllm.core.reads import Reads


class Unconfirmed:
    """Stands before the two methods of a KVCacheManager that put blocks into the cache."""

    def __init__(self, manager: KVCacheManager, reads: Reads) -> None:
        self._reads = reads
        self._allocate, self._cache = manager.allocate_slots, manager.cache_blocks
        setattr(manager, "allocate_slots", self._allocate_slots)  # noqa: B010
        setattr(manager, "cache_blocks", self._cache_blocks)  # noqa: B010

    def _allocate_slots(self, request: Request, *args: Any, **options: Any) -> KVCacheBlocks | None:
        # The book knows a leg that is copied ahead from when it got its blocks; one that is read within its
        # step is about to be written into it, with the very blocks that this gives.
        if request.request_id in self._reads or options.get("num_external_computed_tokens"):
            options["delay_cache_blocks"] = True
        return self._allocate(request, *args, **options)

    def _cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        if request.request_id not in self._reads:
            self._cache(request, num_computed_tokens)
