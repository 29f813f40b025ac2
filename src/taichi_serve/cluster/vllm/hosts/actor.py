"""What an actor of Ray is made of. The actor imports it, and nothing of vLLM, which would take seconds."""

from __future__ import annotations

import ray
from ray.util import get_node_ip_address

from taichi_serve.cluster.vllm.hosts.holder import Holder


class RayHolder(Holder):
    """A holder that knows from Ray where it is."""

    def __init__(self) -> None:
        super().__init__(str(get_node_ip_address()), str(ray.get_runtime_context().get_node_id()))
