"""Holders in actors of Ray: one for each instance, which has all that the instance needs of one node.

They are detached: they outlive their server, and a later one finds them by their names (holder.py says for
how long). Nothing but this and the actor's class imports Ray, and this only with `--ray`. What goes over its
wires, which pickle, is bytes that are no pickles (words.py); the engines' own sockets are not Ray's.
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
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util import get_node_ip_address, list_named_actors

from taichi_serve.cluster.vllm.hosts.actor import RayHolder
from taichi_serve.cluster.vllm.hosts.found import Found, asked_until
from taichi_serve.cluster.vllm.hosts.held import GoneError, Holding
from taichi_serve.cluster.vllm.hosts.placing import Node, choose
from taichi_serve.cluster.vllm.hosts.words import FREE_SECONDS, LATER, Begun, Offer, Order, Said
from taichi_serve.sliders import Kind

ASK = 0.5  # seconds between two looks whether a place is still wanted
CHOSEN_SECONDS = 15.0  # for which the node that was chosen is waited for; after that any will do
UNAVAILABLE_SECONDS = 10.0  # in which a holder that cannot be reached may be reached again
ANSWER_SECONDS = 5.0  # that holders may take to say whether their engine is to be had
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
    """The places of one server's instances. `say` tells people. Holders are called after the `server`, a name
    that no other one has, and after what it has in common with those that may have its engines (`like`)."""

    needs: Needs
    say: Callable[[str], None]
    server: str
    like: str
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
        holding = self._holding(name, chosen, CHOSEN_SECONDS, wanted) if chosen is not None else None
        if holding is None and wanted():
            self.forget(name)  # others may find room there
            self.say(f"instance {name} waits for a place: {self.needs.bundle} on one node")
            holding = self._holding(name, None, None, wanted)
        if holding is None:
            self.forget(name)
            return None
        self.settle(name, kind, holding)
        return holding

    def _holding(
        self, name: str, node: Node | None, seconds: float | None, wanted: Callable[[], bool]
    ) -> RayHolding | None:
        """A holder on this node, or on any; None where there was no room in time."""
        made: Any = ray.remote(RayHolder)
        actor = made.options(
            name=f"{self.like}/{self.server}-{name}" + ("" if node is not None else "-any"),
            lifetime="detached",
            num_cpus=self.needs.cpus,
            num_gpus=self.needs.gpus,
            resources={f"node:{node.address}": 0.001} if node is not None else {},
            max_restarts=0,
            max_concurrency=THREADS,
        ).remote()
        holding = RayHolding(self, name, actor)
        answer, waited = actor.at.remote(), 0.0
        try:
            while wanted() and (seconds is None or waited < seconds):
                if ray.wait([answer], timeout=ASK)[0]:
                    with saying():
                        holding.at = ray.get(answer)
                    return holding
                waited += ASK
        except GoneError:
            holding.leave()
            raise
        holding.leave()
        return None

    def settle(self, name: str, kind: Kind, holding: Holding) -> None:
        """A process of this name is where this holder is."""
        assert isinstance(holding, RayHolding)
        holding.name = name
        node, address = holding.at
        self._at[name] = Spot(node, address, kind)

    def offers(self) -> list[Found]:
        """Engines whose server is gone; they are this one's now. Who does not answer has none. A server that
        is started again may ask before it is certain that the last one is gone."""
        names = [name for name in list_named_actors() if name.startswith(f"{self.like}/")]
        actors = []
        for name in names:
            with contextlib.suppress(ValueError, RayError):  # it has just ended
                actors.append(ray.get_actor(name))
        return asked_until(self._offered, actors, FREE_SECONDS + ASK)

    def _offered(self, actors: list[Any]) -> tuple[list[Found], list[Any]]:
        """What these offer, and those that are to be asked again."""
        asked = {actor.offer.remote(self.server): actor for actor in actors}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        found, later = [], []
        for answer in answered:
            with contextlib.suppress(GoneError), saying():
                if (offer := ray.get(answer)) == LATER:
                    later.append(asked[answer])
                elif offer:
                    its = msgspec.msgpack.decode(offer, type=Offer)
                    holding = FoundHolding(self, its.name, asked[answer])
                    holding.at = ray.get(asked[answer].at.remote(), timeout=ANSWER_SECONDS)
                    found.append(Found(its, holding))
        return found, later

    def forget(self, name: str) -> None:
        """Its place is free."""
        self._at.pop(name, None)

    def address(self, name: str) -> str:
        """The host of an instance; "" where it is not known. Never waits."""
        return spot.address if (spot := self._at.get(name)) is not None else ""


class RayHolding:
    """A holder in an actor."""

    at: tuple[str, str] = ("", "")  # its node and its address
    _others = False  # whether another server has it by now

    def __init__(self, rays: Rays, name: str, actor: Any) -> None:
        self.name = name
        self._rays, self._actor = rays, actor

    def begin(self, order: Order) -> Begun:
        """Start it."""
        with saying():  # once: it is there, or is not
            begun = ray.get(self._actor.begin.remote(msgspec.msgpack.encode(order)))
        return msgspec.msgpack.decode(begun, type=Begun)

    def keep(self, seconds: float) -> None:
        """It serves, and waits so long for another server."""
        self._get("keep", seconds)

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
            if not self._others:
                ray.kill(self._actor)
        self._rays.forget(self.name)

    def _get(self, method: str, *args: Any) -> Any:
        """Whoever cannot be reached is asked again for a while: what is asked may be asked twice."""
        asked = 0
        while True:
            with saying():
                try:
                    return ray.get(getattr(self._actor, method).remote(self._rays.server, *args))
                except PermissionError:
                    self._others = True
                    raise
                except ActorUnavailableError:
                    asked += 1
                    if asked > UNAVAILABLE_SECONDS / ASK:
                        raise
            time.sleep(ASK)


class FoundHolding(RayHolding):
    """That of an engine which serves already."""

    def begin(self, order: Order) -> Begun:
        """Have it speak to this server."""
        return msgspec.msgpack.decode(self._get("again", msgspec.msgpack.encode(order.keys)), type=Begun)


@contextlib.contextmanager
def saying() -> Iterator[None]:
    """Whatever Ray raises says that a holder is gone."""
    try:
        yield
    except GetTimeoutError as late:
        raise GoneError("its actor did not answer in time") from late
    except RayError as wrong:  # the actor's own errors, too
        raise GoneError(_why(wrong)) from wrong


def _why(wrong: Exception) -> str:
    """One line of what Ray says in many."""
    lines = [line.strip() for line in str(wrong).splitlines() if line.strip()]
    return lines[-1] if lines else type(wrong).__name__
