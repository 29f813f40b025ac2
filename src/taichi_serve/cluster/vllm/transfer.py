"""vLLM's settings of the KV transfer between the instances of one server."""

from __future__ import annotations

from vllm.config import KVTransferConfig

# Seconds that a source keeps the blocks of a request that left: for ever, as far as a process can tell. It
# gives them up when it is told to, never because of a clock: any process may stand still for any time, and
# who reads cannot know how long it did (docs/decisions/118). vLLM takes whole seconds, and divides them.
LEASE = 10 * 365 * 24 * 3600


def transfer_config(engine_id: str, directory: str, direct: bool = True) -> KVTransferConfig:
    """vLLM's KV transfer settings for one instance. A failed load is recomputed, never an error to the user.

    `directory` is where the instances of one server find each other (host.py, copier.py); without `direct`
    everything goes over NIXL.
    """
    return KVTransferConfig(
        kv_connector="FlowConnector",
        kv_connector_module_path="taichi_serve.cluster.vllm.connector",
        kv_role="kv_both",
        engine_id=engine_id,
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "kv_lease_duration": LEASE,
            "taichi_directory": directory,
            "taichi_direct": direct,
        },
    )
