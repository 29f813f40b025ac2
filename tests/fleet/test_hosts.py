"""Instances on several hosts: namespaces with a raylet in each. The server is beside the raylet of the first.

Each host has room for one instance, so every move crosses the network, over NIXL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")

from hosts import Host, network
from load import PATH, Wish, moves, streamed, streamed_and_moved, view, wishes, wrong
from rays import SETTINGS, Node, ended
from servers import Server, eventually, until

from taichi_serve.bench.client import Answer, stream

pytestmark = pytest.mark.fleet

WISHES = wishes(32, seed=4, prompt=(16, 700), output=(120, 240))  # long enough to be moved on a busy machine
LONG = wishes(12, seed=5, prompt=(64, 400), output=(200, 300))
APART = (
    "--p-heavy",
    "1",
    "--d-heavy",
    "1",
    "--d-chunk",
    "0",
    "--watermark",
    "1",
)  # each decode is handed over
TIMES = 2  # moves of every request at least
ROUNDS = 5
LOST_SECONDS = 30  # within which a node that died is known to be gone
BACK_SECONDS = 120  # within which an instance serves on a node that came
KEEP_SECONDS = 60  # that engines wait for another server
GONE_SECONDS = KEEP_SECONDS + 30  # within which nothing is left of a server that was killed
SERVES_SECONDS = 5  # from finding engines to the first token


class Cluster:
    """Hosts `a` and `b` with a node each, and `c` that may get one; a server on `a`."""

    def __init__(self, hosts: list[Host], nodes: list[Node], directory: Path) -> None:
        self.hosts, self.nodes, self.directory = hosts, nodes, directory
        nodes.append(Node(hosts[0], directory / "a", 1, None, 0))
        nodes.append(Node(hosts[1], directory / "b", 1, nodes[0].head, 1))
        self.server = self.serve("s")

    def serve(self, name: str, port: int | None = None) -> Server:
        """A server on `a`, with a directory of this name."""
        here = self.hosts[0]
        words = ("--ray", "--ray-address", self.nodes[0].head, "--keep-engines", str(KEEP_SECONDS), *APART)
        there = {"host": here.address, "under": here.within(), "env": SETTINGS}
        return Server(self.directory / name, *words, port=port, **there)

    def kill_server(self) -> None:
        """With all that is below it, in the middle of whatever it does."""
        for process in self.server.family():
            process.kill()
        self.server.process.wait()
        self.server.reserved.close()

    def add(self) -> None:
        """One more node, on the third host."""
        self.nodes.append(Node(self.hosts[2], self.directory / "c", 1, self.nodes[0].head, 1))

    def at(self) -> dict[str, str]:
        """The host of each instance."""
        return {one["name"]: one["devices"] for one in self.server.state()["instances"]}

    def left(self) -> list[Path | str]:
        """What instances have on the hosts that live: directories and processes."""
        living = [node for node in self.nodes if not node.dead]
        files = [path for node in living for path in node.directory.glob("taichi-*")]
        return [*files, *(name for node in living for name in node.engines())]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with network("a", "b", "c") as hosts, ended([]) as nodes:
        made = Cluster(hosts, nodes, tmp_path_factory.mktemp("f"))
        try:
            made.server.wait_ready()
            yield made
            made.server.stop(logs_stay=True)
            eventually(lambda: made.left() == [], 10, "nothing of it is on any host")
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


def decodes(server: Server, name: str) -> Callable[[], Awaitable[bool]]:
    """Whether a request decodes on this instance."""

    async def now() -> bool:
        return bool(server.instance(name)["decodes"])

    return now


def back(server: Server, name: str, restarts: int) -> Callable[[], Awaitable[bool]]:
    """Whether this instance serves after so many restarts."""

    async def now() -> bool:
        one = server.instance(name)
        return bool(one["alive"] and one["restarts"] == restarts)

    return now


async def test_an_engine_that_is_killed_costs_no_stream_and_comes_back(
    cluster: Cluster, reference: list[Answer]
) -> None:
    before = cluster.at()
    async with cluster.server.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in LONG]
        await until(decodes(cluster.server, "i1"), 30, "i1 decodes")
        os.kill(cluster.server.instance("i1")["pid"], signal.SIGKILL)
        assert wrong(await asyncio.gather(*tasks), reference[len(WISHES) :]) == []
        await until(back(cluster.server, "i1", 1), BACK_SECONDS, "i1 serves again")
        results = await streamed_and_moved(client, WISHES[:8], seed=8, times=2)
    assert wrong([answer for answer, _ in results], reference[:8]) == []
    assert sum(moves(legs) for _, legs in results) > 0
    assert cluster.at() == before


async def test_a_holder_that_is_killed_takes_its_engine_with_it_and_the_instance_comes_back(
    cluster: Cluster, reference: list[Answer]
) -> None:
    restarts, engine = (cluster.server.instance("i1")[what] for what in ("restarts", "pid"))
    async with cluster.server.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in LONG]
        await until(decodes(cluster.server, "i1"), 30, "i1 decodes")
        core = psutil.Process(engine)
        core.parent().kill()
        assert wrong(await asyncio.gather(*tasks), reference[len(WISHES) :]) == []
        await until(back(cluster.server, "i1", restarts + 1), BACK_SECONDS, "i1 serves again")
    assert not core.is_running()


async def test_times_of_hosts_whose_clocks_differ_by_a_day_are_times_of_the_server(cluster: Cluster) -> None:
    async with cluster.server.client() as client:
        answers = await streamed(client, WISHES[:4])
        legs = [leg for answer in answers for leg in (await view(client, answer.id))["legs"]]
        lines = (await client.get("/metrics")).text.splitlines()
    moved = [leg["timeline"] for leg in legs if leg.get("timeline")]
    assert moved
    for line in moved:
        times = [
            line[name] for name in ("left", "arrived", "landed", "scheduled", "made", "at") if line[name]
        ]
        assert all(b > a - 0.05 for a, b in pairwise(times))
        assert times[-1] - times[0] < 60
    spent = [line for line in lines if line.startswith("vllm:inter_token_latency_seconds_sum{")]
    assert 0 < sum(float(line.rsplit(" ", 1)[1]) for line in spent) < 3600


async def test_a_host_that_dies_costs_no_stream_that_can_move_and_another_one_takes_its_place(
    cluster: Cluster, reference: list[Answer]
) -> None:
    names = {address: name for name, address in cluster.at().items()}
    victim = names[cluster.hosts[1].address]

    async def lost() -> bool:
        return not cluster.server.instance(victim)["alive"]

    restarts = cluster.server.instance(victim)["restarts"]
    async with cluster.server.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in LONG]
        await until(decodes(cluster.server, victim), 30, f"{victim} decodes")
        cluster.nodes[1].kill()
        await until(lost, LOST_SECONDS, f"{victim} is known to be lost")
        answers = await asyncio.gather(*tasks)
        assert wrong(answers, reference[len(WISHES) :]) == []
        cluster.add()
        await until(
            back(cluster.server, victim, restarts + 1), BACK_SECONDS, f"{victim} serves on the node that came"
        )
        assert cluster.at()[victim] == cluster.hosts[2].address
        results = await streamed_and_moved(client, WISHES[:8], seed=9, times=2)
    assert wrong([answer for answer, _ in results], reference[:8]) == []
    assert sum(moves(legs) for _, legs in results) > 0


def test_what_an_engine_writes_on_its_host_is_in_its_log_at_the_server(cluster: Cluster) -> None:
    (directory,) = (cluster.directory / "s").glob("taichi-*")
    assert "FlowConnector" in (directory / "i0.log").read_text()


async def test_a_server_that_is_killed_under_load_finds_its_engines_again_and_they_have_forgotten_its_streams(
    cluster: Cluster, reference: list[Answer]
) -> None:
    async def all_run() -> bool:
        return sum(one["decodes"] for one in cluster.server.state()["instances"]) == len(LONG)

    async with cluster.server.client() as client:
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in LONG]
        await until(all_run, 30, "all of them decode")
        before = {one["name"]: one["pid"] for one in cluster.server.state()["instances"]}
        cluster.kill_server()
        answers = await asyncio.gather(*tasks)
    assert not any(answer.ok for answer in answers)  # the clients are told: their connections break
    for answer, full in zip(answers, reference[len(WISHES) :], strict=True):
        assert answer.tokens == full.tokens[: len(answer.tokens)]
    began = time.monotonic()
    cluster.server = cluster.serve("again", cluster.server.port)
    found = "taichi: found 2 of 2 instances"
    eventually(lambda: found in cluster.server.said(), 60, "it finds its engines")
    seen = time.monotonic()
    cluster.server.wait_ready()
    ready = time.monotonic()
    async with cluster.server.client() as client:
        await streamed(client, [Wish([5, 6, 7], 1)])
        first = time.monotonic()
        sys.stdout.write(
            f"\nfound {seen - began:.1f} s after its start, ready {ready - seen:.1f} s and first token "
            f"{first - seen:.1f} s after that\n"
        )
        state = cluster.server.quiet(10)
        assert {one["name"]: one["pid"] for one in state["instances"]} == before
        assert first - seen < SERVES_SECONDS
        results = await streamed_and_moved(client, WISHES[:16], seed=10, times=2)
    assert wrong([answer for answer, _ in results], reference[:16]) == []
    assert sum(moves(legs) for _, legs in results) > 0
    cluster.server.quiet(10)
    assert cluster.server.state()["kv_paths"] == {"i0 -> i1": "nixl", "i1 -> i0": "nixl"}


async def test_an_instance_that_was_found_is_replaced_as_every_other_is(
    cluster: Cluster, reference: list[Answer]
) -> None:
    os.kill(cluster.server.instance("i1")["pid"], signal.SIGKILL)
    async with cluster.server.client() as client:
        await until(back(cluster.server, "i1", 1), BACK_SECONDS, "i1 serves again")
        results = await streamed_and_moved(client, WISHES[:8], seed=11, times=2)
    assert wrong([answer for answer, _ in results], reference[:8]) == []


async def test_engines_of_two_servers_that_were_killed_are_found_by_the_third(
    cluster: Cluster, reference: list[Answer]
) -> None:
    before = {one["name"]: one["pid"] for one in cluster.server.state()["instances"]}
    cluster.kill_server()
    cluster.server = cluster.serve("third", cluster.server.port).wait_ready()
    assert "taichi: found 2 of 2 instances" in cluster.server.said()
    assert {one["name"]: one["pid"] for one in cluster.server.state()["instances"]} == before
    async with cluster.server.client() as client:
        results = await streamed_and_moved(client, WISHES[:8], seed=13, times=2)
    assert wrong([answer for answer, _ in results], reference[:8]) == []
    assert sum(moves(legs) for _, legs in results) > 0
    cluster.server.quiet(10)


async def test_engines_that_no_server_comes_for_end_and_the_next_server_begins_anew(
    cluster: Cluster, reference: list[Answer]
) -> None:
    async def clean() -> bool:
        return cluster.left() == []

    cluster.kill_server()
    await until(clean, GONE_SECONDS, "nothing of it is on any host")
    cluster.server = cluster.serve("anew", cluster.server.port).wait_ready()
    assert "taichi: found" not in cluster.server.said()
    async with cluster.server.client() as client:
        results = await streamed_and_moved(client, WISHES[:8], seed=12, times=2)
    assert wrong([answer for answer, _ in results], reference[:8]) == []
    assert sum(moves(legs) for _, legs in results) > 0


def test_what_speaks_to_ray_is_not_imported_without_the_flag() -> None:
    """vLLM imports Ray itself where it is installed."""
    code = """
import json, sys
from taichi_serve.frontend import server
from taichi_serve.cluster.vllm import args
args.parse(["some/model", "--d-heavy", "2"])
print(json.dumps([name for name in sys.modules if name.endswith(("hosts.rays", "hosts.actor"))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: Any = json.loads(done.stdout.splitlines()[-1])
    assert found == []
