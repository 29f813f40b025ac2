"""vLLM's settings of the KV transfer between the instances of one server."""

from __future__ import annotations

import argparse
from typing import Any

from vllm import envs
from vllm.config import KVTransferConfig
from vllm.platforms import current_platform

# Seconds that a source keeps the blocks of a request that left: for ever, as far as a process can tell. It
# gives them up when it is told to, never because of a clock: any process may stand still for any time, and
# who reads cannot know how long it did (docs/decisions/118). vLLM takes whole seconds, and divides them.
LEASE = 10 * 365 * 24 * 3600


def transfer_config(engine_id: str, directory: str, direct: bool = True, memory: int = 0) -> KVTransferConfig:
    """vLLM's KV transfer settings for one instance. A failed load is recomputed, never an error to the user.

    `directory` is where the instances of one server find each other (host.py, copier.py); without `direct`
    everything goes over NIXL. `memory` (bytes of the host) is what vLLM offloads KV to; 0: it does not.
    """
    ours: dict[str, Any] = {
        "kv_connector": "FlowConnector",
        "kv_connector_module_path": "taichi_serve.cluster.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "kv_lease_duration": LEASE,
            "taichi_directory": directory,
            "taichi_direct": direct,
        },
    }
    if memory:
        ours = {
            "kv_connector": "TieredConnector",
            "kv_connector_module_path": "taichi_serve.cluster.vllm.tiered",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": [ours, _offloading(memory)]},
        }
    return KVTransferConfig(engine_id=engine_id, kv_load_failure_policy="recompute", **ours)


def host_bytes(args: argparse.Namespace) -> int:
    """The memory of the host that one instance offloads KV to, all its ranks together; 0: it does not. Raises
    ValueError where that makes no sense."""
    size = args.kv_offloading_size
    if size is None:
        return 0
    if not 0 < size < float("inf"):
        raise ValueError(f"--kv-offloading-size must be GiB above 0, not {size:g}")
    if envs.VLLM_USE_SIMPLE_KV_OFFLOAD:
        raise ValueError("--kv-offloading-size cannot be used with VLLM_USE_SIMPLE_KV_OFFLOAD")
    return int(size * (1 << 30))


def _offloading(memory: int) -> dict[str, Any]:
    """vLLM's offloading of KV to memory of the host. It leaves answers out unless told otherwise, and the
    next turn of a conversation begins with one."""
    settings: dict[str, Any] = {"cpu_bytes_to_use": memory, "offload_prompt_only": False}
    if current_platform.is_cpu():  # its own workers copy between a GPU and its host only
        settings |= {"spec_name": "HostSpec", "spec_module_path": "taichi_serve.cluster.vllm.hostspec"}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings,
    }
