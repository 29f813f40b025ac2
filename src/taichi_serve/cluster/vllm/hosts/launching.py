"""What a server has its instances begun by where they run on other hosts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import msgspec
from vllm.platforms import current_platform

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.curve import Pair
from taichi_serve.cluster.vllm.hosts.found import Found, chosen
from taichi_serve.cluster.vllm.hosts.held import HeldProcess, Holding, Words
from taichi_serve.cluster.vllm.hosts.words import Begun
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

    def offers(self) -> list[Found]:
        """Engines whose server is gone; they are this one's now."""
        ...

    def settle(self, name: str, kind: Kind, holding: Holding) -> None:
        """A process of this name is where this holder is."""
        ...


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """Of an environment, what engines on other hosts are to have, too."""
    found = {k: v for k, v in environment.items() if k.startswith(CARRIED) and k not in ITS_OWN}
    return {**found, **(on_cpu() if current_platform.is_cpu() else {}), **NO_TRACES}


def likeness(argv: list[str], env: Mapping[str, str]) -> str:
    """What servers have in common that may have each other's engines: the same command line, settings and
    version, and nothing else."""
    return sha256(msgspec.json.encode([argv, sorted(env.items()), version("taichi-serve")])).hexdigest()[:16]


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

    mesh: Pair | None = None  # the key of those that were found

    def __init__(self, places: Places, per_instance: int, say: Say, server: str, keep: float = 0.0) -> None:
        """`keep` is for how many seconds they outlive the server."""
        self.devices = Elsewhere(per_instance, places)
        self._places, self._say, self._run, self._keep = places, say, server, keep
        self._found: dict[int, Found] = {}

    def find(self, kinds: Sequence[Kind]) -> None:
        """See which of these instances are there already. Blocks."""
        offers = self._places.offers()
        self._found = chosen(offers, len(kinds))
        for one in offers:
            if one not in self._found.values():
                one.end()
        for index, one in self._found.items():
            self._run, self.mesh = one.offer.run, one.offer.mesh
            self._places.settle(f"i{index}", kinds[index], one.holding)
        if offers:
            self._say(f"found {len(self._found)} of {len(kinds)} instances, of a server that is gone")

    def begin(self, index: int, kind: Kind, argv: list[str], line: Line, called: tuple[str, Path]) -> Process:
        """Start one with this name and log in this directory, and return at once."""
        name, directory = called
        self.devices.begun(index, name)
        words = Words(argv, self.devices.environment(index), self._run, self._keep)
        told = partial(self._told, name)
        if (found := self._found.pop(index, None)) is not None:
            return HeldProcess(name, directory, line, lambda wanted: found.holding, words, told, found.offer)
        place = partial(self._places.place, name, kind)
        return HeldProcess(name, directory, line, place, words, told)

    def _told(self, name: str, begun: Begun) -> None:
        self._say(f"instance {name} begins on {begun.host}")
        if begun.niceness > 0:
            self._say(
                f"instance {name} runs at niceness {begun.niceness}: others go before it; start Ray with "
                "RAY_worker_niceness=0"
            )


def on_ray(args: argparse.Namespace, argv: list[str], world: int, server: str, say: Say) -> tuple[Hosts, str]:
    """The hosts of a cluster of Ray, and this host's address in it. `server` is a name that no other one has.
    Blocks. Raises StartError where Ray, or
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
    places = rays.Rays(rays.Needs(gpus, world), say, server, likeness(argv, carried(os.environ)))
    # Adapters go by numbers, and each server gives its own.
    hosts = Hosts(places, world, say, server, 0.0 if args.enable_lora else args.keep_engines)
    hosts.find(flags.sliders(args).kinds())
    return hosts, args.cluster_host or here
