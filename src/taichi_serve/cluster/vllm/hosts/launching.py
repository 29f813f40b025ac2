"""What a server has its instances begun by where they run on other hosts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from vllm.platforms import current_platform

from taichi_serve.cluster.vllm.hosts.held import HeldProcess, Holding
from taichi_serve.cluster.vllm.hosts.holder import Begun
from taichi_serve.cluster.vllm.server.devices import Devices
from taichi_serve.cluster.vllm.server.line import Line
from taichi_serve.cluster.vllm.server.process import NO_TRACES, Process, StartError
from taichi_serve.cluster.vllm.server.surroundings import on_cpu
from taichi_serve.sliders import Kind

Say = Callable[[str], None]

# What of the server's environment goes to the hosts: settings of what runs there. Not where files and sockets
# are, nor which cores are whose: that is each host's own.
CARRIED = ("VLLM_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TORCH", "NCCL_", "NIXL_", "UCX_")
ITS_OWN = frozenset(
    {
        "VLLM_API_KEY",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_HOST_IP",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "VLLM_NIXL_SIDE_CHANNEL_PORT",
        "VLLM_RPC_BASE_PATH",
        "UCX_NET_DEVICES",
    }
)


class Places(Protocol):
    """Who finds places on hosts, by the names of processes."""

    def place(self, name: str, kind: Kind, wanted: Callable[[], bool]) -> Holding | None:
        """A holder for one, as soon as there is room; None where it is not wanted any more."""
        ...

    def address(self, name: str) -> str:
        """The host that it is on; "" where that is not known."""
        ...


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """Of an environment, what engines on other hosts are to have, too."""
    found = {k: v for k, v in environment.items() if k.startswith(CARRIED) and k not in ITS_OWN}
    return {**found, **(on_cpu() if current_platform.is_cpu() else {}), **NO_TRACES}


class Elsewhere(Devices):
    """Devices of other hosts: who places an instance gives them out. It is told by the host that it is on."""

    def __init__(self, per_instance: int, places: Places) -> None:
        self.per_instance = per_instance
        self._places = places
        self._names: dict[int, str] = {}  # of the last process of each instance

    def begun(self, index: int, name: str) -> None:
        """An instance has a new process."""
        self._names[index] = name

    def of(self, index: int) -> str:
        """The address of its host; "" where it has none yet."""
        name = self._names.get(index)
        return self._places.address(name) if name is not None else ""

    def environment(self, index: int) -> dict[str, str]:
        """Its devices are in the environment of its holder."""
        return carried(os.environ)

    def spare(self) -> set[int]:
        """None of this host's cores: instances are elsewhere."""
        return set()

    def take(self, index: int, named: str | None = None) -> None:
        """Nothing is taken here. Raises ValueError where somebody names devices."""
        if named is not None:
            raise ValueError("devices cannot be named with --ray: it places instances")

    def give_back(self, index: int, failed: bool = False) -> None:
        """Its place was given back with its process."""
        self._names.pop(index, None)


class Hosts:
    """Begins the processes of a server's instances on other hosts."""

    def __init__(self, places: Places, per_instance: int, say: Say) -> None:
        self.devices = Elsewhere(per_instance, places)
        self._places, self._say = places, say

    def begin(self, index: int, kind: Kind, argv: list[str], line: Line, called: tuple[str, Path]) -> Process:
        """Start one with this name and log in this directory, and return at once."""
        name, directory = called
        place = partial(self._places.place, name, kind)
        self.devices.begun(index, name)
        words = argv, self.devices.environment(index)
        return HeldProcess(name, directory, line, place, words, partial(self._told, name))

    def _told(self, name: str, begun: Begun) -> None:
        self._say(f"instance {name} begins on {begun.host}")
        if begun.niceness > 0:
            self._say(
                f"instance {name} runs at niceness {begun.niceness}: others go before it; start Ray with "
                "RAY_worker_niceness=0"
            )


def on_ray(args: argparse.Namespace, world: int, say: Say) -> tuple[Hosts, str]:
    """The hosts of a cluster of Ray, and this host's address in it. Blocks. Raises StartError where Ray, or
    its cluster, is not there."""
    try:
        from taichi_serve.cluster.vllm.hosts import rays
    except ImportError as missing:
        raise StartError(f"--ray: {missing}; install the extra `ray`") from missing
    try:
        here = rays.connect(args.ray_address)
    except (ConnectionError, ValueError, RuntimeError) as wrong:
        raise StartError(f"--ray: no cluster to join: {' '.join(str(wrong).split())}") from wrong
    gpus = 0 if current_platform.is_cpu() else world
    return Hosts(rays.Rays(rays.Needs(gpus, world), say), world, say), args.cluster_host or here
