"""Instances that are added to a server under load, and that leave it: no stream is another, and none ends.

The tests share one server, that starts with one P-heavy and one D-heavy instance, and go one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from load import PATH, wishes
from servers import Server, until

from taichi_serve.bench.client import Answer, stream

FLAGS = ("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "1024", "--d-chunk", "256")
WISHES = wishes(12, seed=33, prompt=(200, 900), output=(150, 250))
START_SECONDS, LEAVE_SECONDS = 240, 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("elastic"), *FLAGS)
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.end()


@pytest.fixture(scope="module")
def reference(server: Server) -> list[Answer]:
    """What the server says before anybody comes or goes."""

    async def run() -> list[Answer]:
        async with server.client() as client:
            return await asyncio.gather(*under_load(client))

    return asyncio.run(run())


def under_load(client: httpx.AsyncClient) -> list[asyncio.Task[Answer]]:
    """All streams, open at once."""
    return [asyncio.ensure_future(stream(client, PATH, wish.body())) for wish in WISHES]


async def same(streams: list[asyncio.Task[Answer]], reference: list[Answer]) -> None:
    """Every stream ends as it should, with the tokens that it always has."""
    for answer, known in zip(await asyncio.gather(*streams), reference, strict=True):
        assert answer.ok, answer.error
        assert answer.tokens == known.tokens


def standing(server: Server, name: str) -> str | None:
    """How an instance stands; None where there is none."""
    state = server.state()
    rows = [*state["elastic"]["starting"], *state["instances"]]
    return next((row["standing"] for row in rows if row["name"] == name), None)


async def added(server: Server, client: httpx.AsyncClient, **body: Any) -> str:
    """One more instance that takes part; its name."""
    answer = await client.post("/taichi/instances", json=body)
    assert answer.status_code == 202, answer.text
    name = answer.json()["name"]
    assert standing(server, name) == "starting"

    async def up() -> bool:
        assert not server.state()["elastic"]["failed"]
        return standing(server, name) == "up"

    await until(up, START_SECONDS, f"{name} takes part")
    return str(name)


async def left(server: Server, client: httpx.AsyncClient, name: str) -> None:
    """An instance leaves, and nothing of it stays."""
    process = psutil.Process(server.instance(name)["pid"])
    family = [process, *process.children(recursive=True)]
    for _ in range(2):  # whoever asks twice changes nothing
        answer = await client.delete(f"/taichi/instances/{name}")
        assert (answer.status_code, answer.json()["standing"]) == (202, "leaving")

    async def gone() -> bool:
        answer = await client.delete(f"/taichi/instances/{name}")
        return answer.status_code == 200

    await until(gone, LEAVE_SECONDS, f"{name} is gone")
    assert standing(server, name) is None
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    directory = next(server.directory.glob("taichi-*"))
    assert not [path for path in directory.rglob(f"*{name}*") if path.suffix != ".log"]


def series(client_text: str, metric: str) -> set[str]:
    """The lines of one metric that name an engine."""
    return {line for line in client_text.splitlines() if line.startswith(metric) and 'engine="' in line}


async def test_one_more_d_heavy_instance_takes_part_and_no_stream_is_another(
    server: Server, reference: list[Answer]
) -> None:
    async with server.client() as client:
        streams = under_load(client)
        name = await added(server, client, kind="d-heavy")
        assert name == "i2"
        await same(streams, reference)
        await same(under_load(client), reference)
        state = server.quiet(40)
        assert [i["name"] for i in state["instances"]] == ["i0", "i1", "i2"]
        assert (state["sliders"]["p_heavy"], state["sliders"]["d_heavy"]) == (1, 2)
        assert server.instance(name)["output_tokens"] > 0
        metrics = (await client.get("/metrics")).text
        assert 'taichi_alive{engine="2"} 1.0' in metrics
        assert series(metrics, "vllm:generation_tokens_total") >= {
            line for line in series(metrics, "vllm:generation_tokens_total") if 'engine="2"' in line
        }
        assert any('engine="2"' in line for line in series(metrics, "vllm:num_requests_running"))
        assert 'taichi_trouble_total{what="statistics"} 0.0' in metrics


async def test_an_instance_leaves_under_load_and_takes_no_token_along(
    server: Server, reference: list[Answer]
) -> None:
    async with server.client() as client:
        streams = under_load(client)

        async def busy() -> bool:
            return bool(server.instance("i1")["decodes"])

        await until(busy, 30, "i1 decodes")
        await left(server, client, "i1")
        await same(streams, reference)
        state = server.quiet(40)
        assert [i["name"] for i in state["instances"]] == ["i0", "i2"]
        assert (state["sliders"]["p_heavy"], state["sliders"]["d_heavy"]) == (1, 1)
        assert state["requests"]["failed"] == 0
        await same(under_load(client), reference)
        metrics = (await client.get("/metrics")).text
        assert not [line for line in series(metrics, "taichi_") if 'engine="1"' in line]
        assert not [line for line in series(metrics, "vllm:") if 'engine="1"' in line]
        assert [line for line in series(metrics, "vllm:") if 'engine="2"' in line]


def janitors_core(process: psutil.Process, name: str) -> psutil.Process | None:
    """The engine core of this instance, if the process is its janitor: the core itself has its name only for
    a moment. What a compiler leaves may be gone, or a zombie, by now."""
    with contextlib.suppress(psutil.Error):
        if f"/{name}.json (janitor)" in " ".join(process.cmdline()):
            return process.parent()
    return None


async def test_one_that_cannot_start_is_told_and_disturbs_nothing(
    server: Server, reference: list[Answer]
) -> None:
    async with server.client() as client:
        streams = under_load(client)
        answer = await client.post("/taichi/instances", json={"kind": "p-heavy"})
        assert answer.status_code == 202
        name = answer.json()["name"]

        async def begun() -> list[psutil.Process]:
            return [core for p in server.family() if (core := janitors_core(p, name)) is not None]

        (starting,) = await until(begun, 30, "its process has begun")
        starting.kill()

        async def failed() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = server.state()["elastic"]["failed"]
            return found

        (failure,) = await until(failed, START_SECONDS, "it has failed")
        assert failure["name"] == name
        assert name in failure["why"]
        await same(streams, reference)
        assert 'taichi_instance_changes_total{change="failed"} 1.0' in (await client.get("/metrics")).text
        assert any(f"INSTANCE {name} COULD NOT BE ADDED" in line for line in server.lines())
        assert (await client.delete(f"/taichi/instances/{name}")).status_code == 200  # it never was


async def test_who_is_needed_stays_and_names_are_never_used_again(server: Server) -> None:
    async with server.client() as client:
        assert (await client.delete("/taichi/instances/i9")).status_code == 404
        await left(server, client, "i0")
        answer = await client.delete("/taichi/instances/i2")
        assert answer.status_code == 409
        assert "i2 is the last one" in answer.json()["error"]["message"]
        assert (await stream(client, PATH, WISHES[0].body())).ok


async def test_several_front_ends_know_who_comes_and_who_leaves(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = Server(tmp_path_factory.mktemp("more"), "--d-heavy", "1", "--api-server-count", "2")
    try:
        server.wait_ready()
        async with server.client() as client:
            known = await asyncio.gather(*under_load(client))
            streams = under_load(client)
            name = await added(server, client, kind="d-heavy")
            await same(streams, known)
            await same(under_load(client), known)
            assert server.instance(name)["output_tokens"] > 0
            await left(server, client, "i0")
            await same(under_load(client), known)
            metrics = (await client.get("/metrics")).text
            assert 'taichi_trouble_total{what="statistics"} 0.0' in metrics
            made = [x for x in series(metrics, "vllm:generation_tokens_total") if 'engine="1"' in x]
            assert float(made[0].split()[-1]) > 0
            assert not [line for line in series(metrics, "vllm:") if 'engine="0"' in line]
        server.stop()
    finally:
        server.end()
