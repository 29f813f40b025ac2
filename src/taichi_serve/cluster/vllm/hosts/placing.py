"""On which host an instance is placed. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from taichi_serve.sliders import Kind


@dataclass(frozen=True, slots=True)
class Node:
    """One host: how many instances there is room for in all, and those of this server by kind."""

    id: str
    address: str
    room: int
    has: Mapping[Kind, int] = field(default_factory=Counter)

    @property
    def free(self) -> int:
        """Instances that still fit."""
        return self.room - sum(self.has.values())


def choose(kind: Kind, nodes: Iterable[Node]) -> Node | None:
    """The node for one more instance; None where none has room.

    The kinds are mixed on every node: KV goes from P-heavy to D-heavy instances, and between two of a node it
    goes through memory. So the node with the fewest of this kind, and of these the one with the most of the
    other; then the one with the most room, so that what is lost with a node is little. Of equal nodes
    the one with the first address: the same hosts get the same instances.
    """
    here = [node for node in nodes if node.free > 0]
    return min(here, key=lambda node: _rank(kind, node), default=None)


def _rank(kind: Kind, node: Node) -> tuple[int, int, int, str]:
    own = node.has.get(kind, 0)
    return own, own - sum(node.has.values()), -node.free, node.address
