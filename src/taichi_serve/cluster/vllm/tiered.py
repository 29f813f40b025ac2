"""Our KV connector and vLLM's offloading to the host, as one: vLLM makes it by name in the engine core and in
every worker.

It is vLLM's own way to have several connectors. The engine core decides which of the two a request asks, and
what the host may have of it (core/host_tier.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector, MultiKVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from taichi_serve.cluster.vllm.connector import FlowConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

OURS, HOST = 0, 1  # the place of each among the connectors


class TieredConnector(MultiConnector):
    """Ours first; the host where ours has nothing for a request."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        flow, host = self._connectors
        assert isinstance(flow, FlowConnector) and isinstance(host, OffloadingConnector)
        self.connector_scheduler = flow.connector_scheduler
        if role is KVConnectorRole.SCHEDULER:
            from taichi_serve.cluster.vllm.core.host_tier import HostTier

            ours = flow.connector_scheduler
            assert ours is not None
            self.host_tier = HostTier(host, ours.reads, ours.block_size)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Of ours, or else of the host."""
        self._requests_to_connector.pop(request.request_id, None)
        tokens, later = self._connectors[OURS].get_num_new_matched_tokens(request, num_computed_tokens)
        chosen = OURS
        if not tokens:
            tokens, later = self.host_tier.matched(request, num_computed_tokens)
            chosen = HOST
        if tokens:
            self._requests_to_connector[request.request_id] = chosen
        return tokens, later

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The chosen one fills the blocks; what the host still reads of them is read before."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if not num_external_tokens:
            return
        if self._requests_to_connector[request.request_id] == HOST:
            self.host_tier.loads(request, blocks)
        else:
            self.host_tier.given_away(blocks)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> MultiKVConnectorMetadata:
        """Of both; the host stores what is certain of each request."""
        self.host_tier.bound(scheduler_output.num_scheduled_tokens)
        return super().build_connector_meta(scheduler_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Of both: what the host has not stored yet it stores with the next step."""
        self.host_tier.ends(request)
        return super().request_finished_all_groups(request, block_ids)

    def reset_cache(self) -> bool:
        """Forget what the host has. vLLM's own ends in an error where no step came since the last time."""
        if self.host_tier.just_reset:
            return True
        done = super().reset_cache()
        self.host_tier.blocks.forget()
        return done

    def take_events(self) -> Iterable[KVCacheEvent]:
        """None: what the host stored and removed is told with each step (core/host_tier.py)."""
        return ()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """As vLLM's own, which finds a connector by a name that only its own have."""
        stats = MultiKVConnectorStats()
        for of in (FlowConnector, OffloadingConnector):
            if (told := (data or {}).get(of.__name__)) is not None:
                stats[of.__name__] = of.build_kv_connector_stats(told)
        return stats
