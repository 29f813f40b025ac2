"""What an actor of Ray is made of. The actor imports it, and nothing of vLLM, which would take seconds."""

from __future__ import annotations

import os
import threading

import ray
from ray.util import get_node_ip_address

from taichi_serve.cluster.vllm.hosts.holder import Holder

LOOK_SECONDS = 1.0  # between two looks whether anybody speaks to it


class RayHolder(Holder):
    """A holder that knows from Ray where it is, and ends when nobody speaks to it any more."""

    def __init__(self) -> None:
        super().__init__(str(get_node_ip_address()), str(ray.get_runtime_context().get_node_id()))
        threading.Thread(target=self._mind, name="forsaken", daemon=True).start()

    def _mind(self) -> None:
        never = threading.Event()
        while not self.forsaken():
            never.wait(LOOK_SECONDS)
        self.clear()
        os._exit(0)  # Ray gives its place to others
