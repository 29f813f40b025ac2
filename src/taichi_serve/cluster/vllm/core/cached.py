"""Which blocks this engine's prefix cache holds, told with each step as what came and what went.

vLLM's block pool keeps its cache in one map, from the hash of a block to every copy of it; nothing enters the
cache or leaves it but through the `insert` and `pop` of that map. So a map of ours in its place knows each
hash that is new and each whose last copy is gone, when it happens and whatever the reason. vLLM's own KV
events say it once for each copy, with the tokens of each block, and cost five times as much.

Blocks of a leg whose KV is still to come are in no cache (unconfirmed.py), so they are not told. Those that a
step fills are in it from when the step is planned: they may be told with the step that runs meanwhile, before
they are filled, and who reads them for another instance waits until they are (prefixes.py).
What is offloaded to the host is told with them (host_tier.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from taichi_serve.cluster.vllm.wire import HASH_BYTES, Caching

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler

    from taichi_serve.cluster.vllm.core.host_tier import HostBlocks


class Noting(BlockHashToBlockMap):
    """vLLM's map, which notes what came since it was last asked, and what went. No hash is in both."""

    def __init__(self, held: BlockHashToBlockMap) -> None:
        super().__init__()
        self._cache = held._cache
        self.came: dict[BlockHashWithGroupId, None] = {}
        self.went: dict[BlockHashWithGroupId, None] = {}

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        """As vLLM's own."""
        if key not in self._cache:
            if key in self.went:
                del self.went[key]
            else:
                self.came[key] = None
        super().insert(key, block)

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        """As vLLM's own."""
        block: KVCacheBlock | None = super().pop(key, block_id)
        if block is not None and key not in self._cache:
            if key in self.came:
                del self.came[key]
            else:
                self.went[key] = None
        return block


class CachedBlocks:
    """What is still to be told of a scheduler's prefix cache. Nothing is noted before somebody asks for it
    (`follow`); everything is told anew where they ask again, and where the cache was reset."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self._host: HostBlocks | None = None
        if (tier := getattr(scheduler.connector, "host_tier", None)) is not None:
            self._host = tier.blocks
        self._noting: Noting | None = None
        self._anew = False
        self._has_requests = scheduler.has_requests
        setattr(scheduler, "has_requests", self._has_something_to_do)  # noqa: B010

    def follow(self, first: str) -> int | str:
        """Tell what is cached from the next record on, all of it in that one. Gives the tokens of a block,
        or why nothing is told. `first` is what the asker's hashes begin with (vLLM's NONE_HASH, as hex)."""
        if (why := self._untold(first)) is not None:
            return why
        self._note()
        if self._host is not None:
            self._host.follow()
        return int(self._pool.hash_block_size)

    def take(self) -> Caching | None:
        """What came and went since the last time; None where nothing did."""
        noting = self._noting
        if noting is None:
            return None
        if self._pool.cached_block_hash_to_block is not noting:  # a reset begins with a map of vLLM's own
            noting = self._note()
        if self._anew:
            self._anew = False
            noting.came.clear()
            noting.went.clear()
            return Caching(_packed(noting._cache), b"", True)
        if not noting.came and not noting.went:
            return None
        caching = Caching(_packed(noting.came), _packed(noting.went))
        noting.came.clear()
        noting.went.clear()
        return caching

    def take_host(self) -> Caching | None:
        """The same of the host."""
        return None if self._host is None else self._host.take()

    def _note(self) -> Noting:
        self._noting = Noting(self._pool.cached_block_hash_to_block)
        self._pool.cached_block_hash_to_block = self._noting
        self._anew = True
        return self._noting

    def _has_something_to_do(self) -> bool:
        # An idle engine whose cache was reset makes one empty step, because it is with steps that it speaks.
        return self._has_requests() or self._due()

    def _due(self) -> bool:
        noting = self._noting
        if noting is None:
            return False
        anew = self._anew or (self._host is not None and self._host.anew)
        return anew or self._pool.cached_block_hash_to_block is not noting

    def _untold(self, first: str) -> str | None:
        if not self._manager.enable_caching:
            return "prefix caching is off"
        managers = self._manager.coordinator.single_type_managers
        kinds = [type(manager).__name__ for manager in managers]
        # Only here a request finds all blocks from its first one on, and only those.
        if [type(manager) for manager in managers] != [FullAttentionManager]:
            return f"its KV is not of one group with full attention ({', '.join(kinds)})"
        if managers[0].block_size != self._pool.hash_block_size:
            return "its blocks are hashed in parts"
        if kv_cache_utils.NONE_HASH.hex() != first:
            return "its hashes have a seed of their own: set PYTHONHASHSEED, or use sha256"
        return None


def _packed(keys: Iterable[BlockHashWithGroupId]) -> bytes:
    return b"".join([key[:HASH_BYTES] for key in keys])
