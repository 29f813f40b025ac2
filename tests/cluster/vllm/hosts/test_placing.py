"""Where an instance is placed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from taichi_serve.cluster.vllm.hosts.placing import Node, choose
from taichi_serve.sliders import Kind

P, D = Kind.P_HEAVY, Kind.D_HEAVY


def placed(kinds: str, rooms: dict[str, int]) -> dict[str, str]:
    """What each node has once these came one after the other: `p` and `d`."""
    nodes = {name: Node(name, f"10.0.0.{n}", room, Counter()) for n, (name, room) in enumerate(rooms.items())}
    for letter in kinds:
        kind = P if letter == "p" else D
        if (node := choose(kind, nodes.values())) is not None:
            nodes[node.id] = replace(node, has=Counter(node.has) + Counter([kind]))
    return {name: "p" * node.has.get(P, 0) + "d" * node.has.get(D, 0) for name, node in nodes.items()}


def test_every_node_gets_both_kinds() -> None:
    assert placed("ppppdddddddddddd", {"a": 4, "b": 4, "c": 4, "d": 4}) == dict.fromkeys("abcd", "pddd")


def test_one_of_each_are_side_by_side() -> None:
    assert placed("pd", {"a": 4, "b": 4}) == {"a": "pd", "b": ""}


def test_what_has_no_room_on_one_node_goes_to_the_next() -> None:
    assert placed("pdd", {"a": 1, "b": 2}) == {"a": "d", "b": "pd"}


def test_a_full_cluster_has_no_place() -> None:
    assert choose(P, [Node("a", "10.0.0.1", 1, Counter({D: 1}))]) is None
    assert choose(P, []) is None


def test_who_comes_back_takes_the_place_of_the_one_that_was_lost() -> None:
    nodes = [Node("a", "", 2, Counter({D: 1})), Node("b", "", 2, Counter({P: 1, D: 1}))]
    chosen = choose(P, nodes)
    assert chosen is not None
    assert chosen.id == "a"
