"""A server whose engines are spoken to over a network, and a stranger on it.

The server's host and the stranger's are network namespaces. Nothing here needs Ray.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hosts import HERE, Host, network
from load import PATH, streamed, wishes, wrong
from servers import Server, until

from taichi_serve.bench.client import stream

pytestmark = pytest.mark.engine

STRANGER = str(Path(__file__).with_name("stranger.py"))
GREETING = 64  # bytes that every ZeroMQ socket says first
FLAGS = ("--p-heavy", "1", "--d-heavy", "1")
LONG = wishes(12, seed=6, prompt=(64, 400), output=(500, 600))


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with network("server", "stranger") as made:
        yield made


@pytest.fixture(scope="module")
def server(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    here = hosts[0]
    words = (*FLAGS, "--cluster-host", here.address)
    made = Server(tmp_path_factory.mktemp("wires"), *words, host=here.address, under=here.within())
    try:
        made.wait_ready()
        yield made
        made.stop(logs_stay=True)  # an instance was lost
    finally:
        made.end()


def listening(host: Host) -> dict[int, str]:
    """Its open ports with the program behind each, as the host itself sees them."""
    found = {}
    for line in host.run("ss", "-ltnpH").splitlines():
        address, port = line.split()[3].rsplit(":", 1)
        if not address.startswith("127."):
            found[int(port)] = match[1] if (match := re.search(r'"([^"]+)"', line)) else ""
    return found


async def served(server: Server, count: int, output: int = 16) -> None:
    """So many requests, each of which moves after its prompt or not, all answered."""
    async with server.client() as client:
        bodies = [
            {"model": "tiny", "prompt": [n + 1] * 300, "max_tokens": output, "ignore_eos": True}
            for n in range(count)
        ]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
    assert [answer.status_code for answer in answers] == [200] * count
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [output] * count


async def test_a_stranger_gets_nothing_from_any_port_and_disturbs_nobody(
    server: Server, hosts: list[Host]
) -> None:
    here, stranger = hosts
    before = {process.pid for process in server.family()}
    seen = json.loads(stranger.run(sys.executable, STRANGER, here.address, timeout=300))
    known = listening(here)
    assert set(seen) <= set(known)
    ours = [port for port in seen if port != server.port]  # HTTP is for everybody
    assert len(ours) >= 7  # two instances: inputs, outputs, a copier, a side channel each; and UCX's own
    ask = asyncio.to_thread(
        stranger.run, sys.executable, STRANGER, here.address, *map(str, ours), timeout=300
    )
    said, _ = await asyncio.gather(ask, served(server, 32))
    assert max(json.loads(said).values()) <= GREETING, {port: known[int(port)] for port in json.loads(said)}
    assert {process.pid for process in server.family()} == before
    state = server.state()
    assert [one["restarts"] for one in state["instances"]] == [0, 0]
    await served(server, 32)
    server.quiet()


async def test_an_instance_that_comes_after_a_stranger_meets_the_others(
    server: Server, hosts: list[Host]
) -> None:
    """Its side channel is asked by the others, and theirs by it."""
    psutil.Process(server.instance("i1")["pid"]).kill()

    def back() -> bool:
        return bool(server.instance("i1")["restarts"] == 1 and server.instance("i1")["alive"])

    for _ in range(600):
        if back():
            break
        await asyncio.sleep(0.2)
    assert back()
    await served(server, 16)


def connected(server: Server, host: Host) -> list[int]:
    """The server's ports that engines are connected to. First that over which most has come: outputs."""
    lines = host.run("ss", "-tniH", "state", "established").splitlines()
    known, came = listening(host), {}
    for line, details in zip(lines[::2], lines[1::2], strict=True):
        port = int(line.split()[2].rsplit(":", 1)[1])
        if port in known and port != server.port and (found := re.search(r"bytes_received:(\d+)", details)):
            came[port] = int(found[1])
    return sorted(came, key=lambda port: -came[port])


@pytest.mark.parametrize("every", [False, True])
async def test_connections_that_are_reset_while_both_ends_live_cost_no_token(
    server: Server, hosts: list[Host], every: bool
) -> None:
    """One, or every one that there is, which leaves no instance for a while. Both ends get a RST, as from a
    firewall that forgot them; ZeroMQ makes connections anew."""

    async def all_run() -> bool:
        return sum(one["decodes"] for one in server.state()["instances"]) == len(LONG)

    async def back() -> bool:
        instances = server.state()["instances"]
        restarts = sum(one["restarts"] for one in instances)
        return restarts == before + 1 + every and all(one["alive"] for one in instances)

    before = sum(one["restarts"] for one in server.state()["instances"])
    async with server.client() as client:
        reference = await streamed(client, LONG)
        tasks = [asyncio.create_task(stream(client, PATH, wish.body())) for wish in LONG]
        await until(all_run, 30, "all of them decode")
        ports = connected(server, hosts[0])
        assert len(ports) >= 6  # inputs, outputs and a copier for each instance
        chosen = " or ".join(f"sport = :{port}" for port in (ports if every else ports[:1]))
        said = hosts[0].run("ss", "-K", "-tnH", *chosen.split())
        assert len(said.splitlines()) >= (len(ports) if every else 1)  # the kernel did it
        assert wrong(await asyncio.gather(*tasks), reference) == []
        await until(back, 120, "every instance whose connection was reset serves again")
    assert any("a connection to it was reset" in line for line in server.lines())
    server.quiet(20)


def test_sockets_of_engines_are_at_the_address_that_was_named_alone(
    server: Server, hosts: list[Host]
) -> None:
    """But those that vLLM makes on the loopback interface for itself."""
    lines = hosts[0].run("ss", "-ltnH").splitlines()
    addresses = {line.split()[3].rsplit(":", 1)[0] for line in lines}
    assert {one for one in addresses if not one.startswith("127.")} == {hosts[0].address}
    assert HERE not in addresses


def test_no_key_is_on_a_command_line_or_in_an_environment(server: Server) -> None:
    (directory,) = server.directory.glob("taichi-*")
    files = list(directory.glob("*.keys"))
    assert len(files) == 2
    keys = [json.loads(path.read_text()) for path in files]
    secrets = {pair["secret"] for one in keys for pair in (one["own"], one["mesh"])}
    assert len(secrets) == 3
    said = server.said() + "".join(path.read_text(errors="replace") for path in directory.glob("*.log"))
    for process in server.family():
        said += " ".join(process.cmdline()) + " ".join(process.environ().values())
    assert not [secret for secret in secrets if secret in said]
