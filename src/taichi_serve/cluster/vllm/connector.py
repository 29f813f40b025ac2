"""vLLM's KV connector with our two sides: vLLM makes it by name in the engine core and in every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class FlowConnector(NixlPullConnector):
    """vLLM's NIXL pull connector with our scheduler's and worker's side."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        # NixlPullConnector would build vLLM's own sides here, agents and threads included.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            from taichi_serve.cluster.vllm.core.connector import FlowConnectorScheduler

            self.connector_scheduler = FlowConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            from taichi_serve.cluster.vllm.worker.connector import FlowConnectorWorker

            self.connector_worker = FlowConnectorWorker(vllm_config, self.engine_id, kv_cache_config)

    def has_connector_metadata(self) -> bool:
        """Never, where vLLM asks: before and after each layer, to wait for its KV and to save it. NIXL does
        neither by layers."""
        return False
