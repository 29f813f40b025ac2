"""Holders in actors of Ray: one for each instance, each in a placement group of its own.

Nothing but this and the actor's class imports Ray, and this only with `--ray`. What goes over Ray's wires,
which pickle, is bytes that are no pickles (holder.py); the engines' own sockets are not Ray's.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import msgspec
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from taichi_serve.cluster.vllm.hosts.actor import RayHolder
from taichi_serve.cluster.vllm.hosts.held import GoneError, Holding
from taichi_serve.cluster.vllm.hosts.holder import Begun, Order, Said
from taichi_serve.cluster.vllm.hosts.placing import Node, choose
from taichi_serve.sliders import Kind

ASK = 0.5  # seconds between two looks whether a place is still wanted
CHOSEN_SECONDS = 5.0  # for which the node that was chosen is waited for; after that any will do
UNAVAILABLE_SECONDS = 10.0  # in which a holder that cannot be reached may be reached again
ACTOR_SECONDS = 60.0  # that an actor may take to begin: Ray starts a Python for it
THREADS = 4  # of an actor: one follows, others signal and end


@dataclass(frozen=True, slots=True)
class Needs:
    """What one instance takes of its node."""

    gpus: int
    cpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray says it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def room(self, resources: dict[str, float]) -> int:
        """How many such instances a node with these resources has room for."""
        by_cpu = int(resources.get("CPU", 0.0) // self.cpus)
        return min(by_cpu, int(resources.get("GPU", 0.0) // self.gpus)) if self.gpus else by_cpu


@dataclass(frozen=True, slots=True)
class Spot:
    """Where an instance is, or is to be."""

    node: str
    address: str
    kind: Kind


def connect(address: str | None) -> str:
    """Join the cluster of Ray at this address, or that of this host; the own address there. Raises
    ConnectionError where there is none. Not from the main thread: Ray would take its signals."""
    quiet = {"configure_logging": False, "log_to_driver": False, "logging_level": logging.WARNING}
    ray.init(address=address or "auto", namespace="taichi", **quiet)
    return str(get_node_ip_address())


@dataclass
class Rays:
    """The places of one server's instances. `say` tells people."""

    needs: Needs
    say: Callable[[str], None]
    _at: dict[str, Spot] = field(default_factory=dict)  # by the name of a process
    _lock: Lock = field(default_factory=Lock)

    def nodes(self) -> list[Node]:
        """All that are alive."""
        count: dict[str, Counter[Kind]] = {}
        for spot in list(self._at.values()):
            count.setdefault(spot.node, Counter())[spot.kind] += 1
        return [
            Node(
                one["NodeID"],
                one["NodeManagerAddress"],
                self.needs.room(one["Resources"]),
                count.get(one["NodeID"], Counter()),
            )
            for one in ray.nodes()
            if one["Alive"]
        ]

    def place(self, name: str, kind: Kind, wanted: Callable[[], bool]) -> Holding | None:
        """A holder for a process of this name; waits for a place as long as it is wanted."""
        with self._lock:  # who comes next has to see where this one goes
            chosen = choose(kind, self.nodes())
            if chosen is not None:
                self._at[name] = Spot(chosen.id, chosen.address, kind)
        group = self._group(chosen, CHOSEN_SECONDS, wanted) if chosen is not None else None
        if group is None and wanted():
            self.say(f"instance {name} waits for a place: {self.needs.bundle} on one node")
            group = self._group(None, None, wanted)
        if group is None:
            self._at.pop(name, None)
            return None
        try:
            holding = RayHolding(self, name, group, self.needs)
        except GoneError:
            self.forget(name)
            remove_placement_group(group)
            raise
        node, address = holding.at
        self._at[name] = Spot(node, address, kind)
        return holding

    def _group(self, node: Node | None, seconds: float | None, wanted: Callable[[], bool]) -> Any:
        """A placement group on this node, or on any; None where there was no room in time."""
        pinned = {f"node:{node.address}": 0.001} if node is not None else {}
        group = placement_group([{**self.needs.bundle, **pinned}], strategy="STRICT_PACK")
        waited = 0.0
        while wanted() and (seconds is None or waited < seconds):
            if group.wait(ASK):
                return group
            waited += ASK
        remove_placement_group(group)
        return None

    def forget(self, name: str) -> None:
        """Its place is free."""
        self._at.pop(name, None)

    def address(self, name: str) -> str:
        """The host of an instance; "" where it is not known. Never waits."""
        return spot.address if (spot := self._at.get(name)) is not None else ""


class RayHolding:
    """A holder in an actor."""

    def __init__(self, rays: Rays, name: str, group: Any, needs: Needs) -> None:
        """Raises GoneError where the actor does not begin."""
        self._rays, self._name, self._group = rays, name, group
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=0)
        kind: Any = ray.remote(RayHolder)
        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "scheduling_strategy": strategy}
        self._actor = kind.options(**options, max_restarts=0, max_concurrency=THREADS).remote()
        with self._saying():
            self.at: tuple[str, str] = ray.get(self._actor.at.remote(), timeout=ACTOR_SECONDS)

    def begin(self, order: Order) -> Begun:
        """Start it."""
        with self._saying():  # once: it is there, or is not
            begun = ray.get(self._actor.begin.remote(msgspec.msgpack.encode(order)))
        return msgspec.msgpack.decode(begun, type=Begun)

    def follow(self, at: int) -> Said:
        """What it wrote since, soon."""
        return msgspec.msgpack.decode(self._get("follow", at), type=Said)

    def signal(self, number: int) -> None:
        """Send its process a signal."""
        self._get("signal", number)

    def kill(self) -> None:
        """End its group."""
        self._get("kill")

    def end(self) -> bool:
        """End its group and take away what it left."""
        return bool(self._get("end"))

    def leave(self) -> None:
        """Give its place back."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._actor)
        with contextlib.suppress(RayError, ValueError):
            remove_placement_group(self._group)
        self._rays.forget(self._name)

    def _get(self, method: str, *args: Any) -> Any:
        """Whoever cannot be reached is asked again for a while: what is asked may be asked twice."""
        asked = 0
        while True:
            with self._saying():
                try:
                    return ray.get(getattr(self._actor, method).remote(*args))
                except ActorUnavailableError:
                    asked += 1
                    if asked > UNAVAILABLE_SECONDS / ASK:
                        raise
            time.sleep(ASK)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except GetTimeoutError as late:
            raise GoneError("its actor did not begin in time") from late
        except RayActorError as gone:
            raise GoneError(_why(gone)) from gone
        except RayError as wrong:  # the actor's own errors, too
            raise GoneError(_why(wrong)) from wrong


def _why(wrong: Exception) -> str:
    """One line of what Ray says in many."""
    lines = [line.strip() for line in str(wrong).splitlines() if line.strip()]
    return lines[-1] if lines else type(wrong).__name__
