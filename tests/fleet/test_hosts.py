"""Instances on several hosts: namespaces with a raylet in each. The server is beside the raylet of the first.

Each host has room for one instance, so every move crosses the network, over NIXL.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from hosts import Host, network, possible
from load import PATH, moves, streamed, streamed_and_moved, wishes, wrong
from rays import SETTINGS, Node, ended
from servers import Server, until

from taichi_serve.bench.client import Answer, stream

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.skipif(not possible(), reason="needs root and `ip` for network namespaces"),
]

WISHES = wishes(32, seed=4, prompt=(16, 700), output=(32, 120))
LONG = wishes(12, seed=5, prompt=(64, 400), output=(200, 300))
TIMES = 2  # moves of every request at least
ROUNDS = 5
LOST_SECONDS = 30  # within which a node that died is known to be gone
BACK_SECONDS = 120  # within which an instance serves on a node that came


class Cluster:
    """Hosts `a` and `b` with a node each, and `c` that may get one; a server on `a`."""

    def __init__(self, hosts: list[Host], nodes: list[Node], directory: Path) -> None:
        self.hosts, self.nodes, self.directory = hosts, nodes, directory
        nodes.append(Node(hosts[0], directory / "a", 1, None, 0))
        nodes.append(Node(hosts[1], directory / "b", 1, nodes[0].head, 1))
        here = hosts[0]
        words = ("--p-heavy", "1", "--d-heavy", "1", "--ray", "--ray-address", nodes[0].head)
        self.server = Server(directory / "s", *words, host=here.address, under=here.within(), env=SETTINGS)

    def add(self) -> None:
        """One more node, on the third host."""
        self.nodes.append(Node(self.hosts[2], self.directory / "c", 1, self.nodes[0].head, 1))

    def at(self) -> dict[str, str]:
        """The host of each instance."""
        return {one["name"]: one["devices"] for one in self.server.state()["instances"]}

    def left(self) -> list[Path]:
        """What instances have on the hosts that live."""
        living = [node for node in self.nodes if not node.dead]
        return [path for node in living for path in node.directory.glob("taichi-*")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with network("a", "b", "c") as hosts, ended([]) as nodes:
        made = Cluster(hosts, nodes, tmp_path_factory.mktemp("f"))
        try:
            made.server.wait_ready()
            yield made
            made.server.stop(logs_stay=True)
            assert made.left() == []
        finally:
            made.server.end()


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> list[Answer]:
    """What one instance says: the other one is drained."""

    async def run() -> list[Answer]:
        async with cluster.server.client() as client:
            assert (await client.post("/taichi/instances/i1/drain")).is_success
            answers = await streamed(client, [*WISHES, *LONG])
            assert (await client.post("/taichi/instances/i1/resume")).is_success
            return answers

    answers = asyncio.run(run())
    assert [answer.error for answer in answers if not answer.ok] == []
    assert not any(cluster.server.state()["moves"][kind] for kind in ("hand-over", "operator"))
    return answers


def test_one_instance_is_on_each_host_and_kv_goes_over_nixl_between_them(cluster: Cluster) -> None:
    first, second = (host.address for host in cluster.hosts[:2])
    assert sorted(cluster.at().values()) == [first, second]
    assert cluster.server.state()["kv_paths"] == {"i0 -> i1": "nixl", "i1 -> i0": "nixl"}


async def test_32_of_32_streams_that_moved_between_hosts_say_what_one_instance_says(
    cluster: Cluster, reference: list[Answer]
) -> None:
    todo = list(range(len(WISHES)))
    async with cluster.server.client() as client:
        for number in range(ROUNDS):
            these = [WISHES[i] for i in todo]
            results = await streamed_and_moved(client, these, seed=number, times=3, at_once=number > 0)
            assert wrong([answer for answer, _ in results], [reference[i] for i in todo]) == []
            todo = [i for i, (_, legs) in zip(todo, results, strict=True) if moves(legs) < TIMES]
            if not todo:
                break
    assert todo == []
    state = cluster.server.quiet(20)
    assert state["requests"]["failed"] == 0
    assert state["moves"]["hand-over"] > 0
    assert state["moves"]["operator"] > 0


async def test_a_host_that_dies_costs_no_stream_that_can_move_and_another_one_takes_its_place(
    cluster: Cluster, reference: list[Answer]
) -> None:
    names = {address: name for name, address in cluster.at().items()}
    victim = names[cluster.hosts[1].address]

    async def decodes() -> bool:
        return bool(cluster.server.instance(victim)["decodes"])

    async def lost() -> bool:
        return not cluster.server.instance(victim)["alive"]

    async def back() -> bool:
        one = cluster.server.instance(victim)
        return bool(one["alive"] and one["restarts"] == 1)

    async with cluster.server.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in LONG]
        await until(decodes, 30, f"{victim} decodes")
        cluster.nodes[1].kill()
        await until(lost, LOST_SECONDS, f"{victim} is known to be lost")
        answers = await asyncio.gather(*tasks)
        assert wrong(answers, reference[len(WISHES) :]) == []
        cluster.add()
        await until(back, BACK_SECONDS, f"{victim} serves on the node that came")
        assert cluster.at()[victim] == cluster.hosts[2].address
        results = await streamed_and_moved(client, WISHES[:8], seed=9, times=2)
    assert wrong([answer for answer, _ in results], reference[:8]) == []
    assert sum(moves(legs) for _, legs in results) > 0


def test_what_an_engine_writes_on_its_host_is_in_its_log_at_the_server(cluster: Cluster) -> None:
    (directory,) = (cluster.directory / "s").glob("taichi-*")
    assert "FlowConnector" in (directory / "i0.log").read_text()


def test_nothing_of_ray_is_imported_without_the_flag() -> None:
    code = """
import json, sys
from taichi_serve.frontend import server
from taichi_serve.cluster.vllm import args
args.parse(["some/model", "--d-heavy", "2"])
found = [name for name in sys.modules if name.split(".")[0] == "ray" or name.endswith("hosts.rays")]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: Any = json.loads(done.stdout.splitlines()[-1])
    assert found == []
