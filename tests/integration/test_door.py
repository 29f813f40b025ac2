"""The door of a real server: who may come in, what may come in, and what means all instances."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from load import PATH, Wish, until_known
from servers import Server, until

KEYS = ("the-first-key", "another-key")
MIB = 1 << 20
OK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0}
CHAT_OK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
LONG = Wish([5] * 40, 3000)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """i0 P-heavy and i1 D-heavy behind two keys, with the routes of development."""
    server = Server(
        tmp_path_factory.mktemp("door"),
        *("--p-heavy", "1", "--d-heavy", "1", "--metrics-without-key", "--api-key", *KEYS),
        env={"VLLM_SERVER_DEV_MODE": "1"},
    )
    server.headers = {"Authorization": f"Bearer {KEYS[1]}"}
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.end()


@pytest.fixture
async def client(door: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with door.client() as client:
        yield client


def check(answer: httpx.Response, status: int) -> str:
    """OpenAI's form of an error, Anthropic's on its routes; returns its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    if answer.url.path.startswith("/v1/messages"):
        assert (answer.json()["type"], error.keys()) == ("error", {"type", "message"})
    else:
        assert error["code"] == status
    message: str = error["message"]
    return message


# ------------------------------------------------------------------------------------------------- the key


async def test_every_route_that_is_published_asks_for_a_key(door: Server, client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/collective_rpc", "/invocations", "/tokenize", "/v1/completions", "/taichi/state"} <= set(paths)
    answers: dict[tuple[str, str], int] = {}
    async with httpx.AsyncClient(base_url=door.url, timeout=30) as stranger:
        for path, methods in paths.items():
            for method in methods:
                answers[method, path] = (await stranger.request(method, path)).status_code
        assert (await stranger.get("/metrics")).status_code == 200
        assert (await stranger.get("/docs")).status_code == 401
    free = {path for (_, path), status in answers.items() if status != 401}
    assert free == {"/health", "/live", "/ready", "/ping", "/version", "/metrics"}


async def test_either_key_opens(door: Server) -> None:
    for key in KEYS:
        async with httpx.AsyncClient(base_url=door.url, headers={"Authorization": f"Bearer {key}"}) as one:
            assert (await one.post(PATH, json=OK, timeout=60)).status_code == 200


async def test_without_a_key_a_large_body_costs_the_server_nothing(door: Server) -> None:
    """Forty of them at once are turned away before they are read, and nobody else waits."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {16 * MIB}\r\n\r\n"

    async def intrude() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        writer.write(head.encode() + b'{"prompt": "' + b"\\u0041" * 40_000)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    began = time.monotonic()
    answers = await asyncio.gather(*(intrude() for _ in range(40)))
    assert all(answer.startswith(b"HTTP/1.1 401") for answer in answers)
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------------------------------------- the request


async def test_a_body_that_stops_coming_is_given_up_after_half_a_minute(door: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode())
    began = time.monotonic()
    answer = await asyncio.wait_for(reader.read(), 60)
    assert 29 < time.monotonic() - began < 40
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 408
    writer.close()


POSTS = {
    PATH: OK,
    "/v1/chat/completions": CHAT_OK,
    "/v1/chat/completions/batch": CHAT_OK | {"messages": [CHAT_OK["messages"]] * 2},
    "/v1/messages": CHAT_OK,
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 4},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"max_tokens": 4}},
    "/invocations": OK,
    "/tokenize": {"model": "tiny", "prompt": "hi"},
}
DEEP = b"[" * 500 + b"]" * 500


@pytest.mark.parametrize("path", POSTS)
async def test_hostile_bodies_get_4xx_in_the_form_of_their_api(path: str, client: httpx.AsyncClient) -> None:
    good = json.dumps(POSTS[path]).encode()
    internal = json.dumps(POSTS[path] | {"kv_transfer_params": {"do_remote_prefill": True}})
    bad: list[bytes] = [
        good[:-1] + b', "tools": ' + DEEP + b"}",
        good[:-1] + b', "extra": ' + b"[" * 100_000,
        good[:-1] + b', "max_tokens": ' + b"9" * 5_000 + b"}",
        internal.encode(),
        internal.replace("kv_", "\\u006b\\u0076_").encode(),
        internal.encode("utf-16"),
        internal.encode("utf-8-sig"),
        internal.encode()[:-1] + b', "kv_transfer_params": {"a": 1}}',
        json.dumps(POSTS[path] | {"vllm_xargs": {"taichi": "x"}}).encode(),
        json.dumps(POSTS[path] | {"sampling_params": {"extra_args": {"taichi": "x"}}}).encode(),
        b"",
        b"\xff",
        b"nothing",
    ]
    for body in bad:
        answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (body[:80], answer.text)
        check(answer, answer.status_code)
    many = {f"x-{number}": "y" for number in range(10_000)}
    check(await client.post(path, content=good, headers=many), 431)


@pytest.mark.parametrize("depth", [10, 40, 60])
async def test_whatever_depth_is_let_in_is_no_servers_error(depth: int, client: httpx.AsyncClient) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth // 2 - 4):
        schema = {"type": "object", "properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for path, more in (("/v1/chat/completions", {"tools": tools}), ("/invocations", {"tools": tools})):
        answer = await client.post(path, json=CHAT_OK | more)
        assert answer.status_code < 500, answer.text


# ------------------------------------------------------------------------------------------------------ ids


async def test_a_request_is_found_and_moved_by_its_own_id_only(client: httpx.AsyncClient) -> None:
    ids = ("job", "job-2", "job-2-0", "a/b c%2Fd?#", "job/flow")
    tasks = []
    async with asyncio.TaskGroup() as group:
        for name in ids:
            headers = {"X-Request-Id": name}
            tasks.append(group.create_task(client.post(PATH, json=LONG.body(), headers=headers)))
        for name in ids:
            await until_known(client, quote(f"cmpl-{name}", safe=""))
        for name in ids:
            where = f"/taichi/requests/{quote(f'cmpl-{name}', safe='')}"
            shown = (await client.get(where)).json()["requests"]
            assert [one["id"].rsplit("-", 2)[0] for one in shown] == [f"cmpl-{name}"]

        async def moved() -> list[str]:
            answer = await client.post("/taichi/requests/cmpl-job/flow", json={"to": "i0"})
            return answer.json()["asked"] if answer.status_code == 202 else []

        asked = await until(moved, 20, "cmpl-job decodes and can be moved")
        assert [name.rsplit("-", 2)[0] for name in asked] == ["cmpl-job"]
        check(await client.get("/taichi/requests/cmpl-jo"), 404)
        aborted = await client.post("/abort_requests", json={})
        assert aborted.json()["aborted"] == len(ids)
    assert {task.result().json()["choices"][0]["finish_reason"] for task in tasks} == {"abort"}


async def test_the_choices_of_a_request_are_one_request(client: httpx.AsyncClient) -> None:
    body = CHAT_OK | {"n": 2, "request_id": "한국어 ☃"}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    shown = (await client.get(f"/taichi/requests/{quote(answer.json()['id'], safe='')}")).json()["requests"]
    assert len(shown) == 2


async def test_of_two_with_one_id_the_live_one_is_meant(client: httpx.AsyncClient) -> None:
    headers = {"X-Request-Id": "twin"}
    assert (await client.post(PATH, json=OK, headers=headers)).status_code == 200
    task = asyncio.create_task(client.post(PATH, json=LONG.body(), headers=headers))

    async def running() -> bool:
        shown = (await client.get("/taichi/requests/cmpl-twin")).json()["requests"]
        assert len(shown) == 1
        return all(row["type"] != "Finished" for row in shown[0]["log"])

    await until(running, 20, "the second one is shown")
    assert (await client.post("/abort_requests", json={"request_ids": ["cmpl-twin-0"]})).status_code == 200
    await task


# ------------------------------------------------------------------------------------------- all instances


async def test_what_vllm_asks_of_an_engine_is_asked_of_all(door: Server, client: httpx.AsyncClient) -> None:
    door.quiet(10)
    assert (await client.post("/reset_prefix_cache")).json() == {"success": True}
    for path in ("/reset_mm_cache", "/reset_encoder_cache"):
        assert (await client.post(path)).status_code == 200
    assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}
    assert (await client.get("/is_paused")).json() == {"is_paused": False}
    assert (await client.get("/kv_event_sources")).json() == {}
    assert (await client.post("/is_scaling_elastic_ep")).json() == {"is_scaling_elastic_ep": False}
    assert "weight_version" in (await client.get("/weight_info")).json()
    assert (await client.get("/server_info")).status_code == 200
    asked = await client.post("/collective_rpc", json={"method": "check_health"})
    assert asked.json() == {"results": [None, None]}
    for path in ("/pause", "/sleep", "/scale_elastic_ep", "/update_weights"):
        assert check(await client.post(path, json={}), 501).endswith(".")
    assert (await client.post(PATH, json=OK)).status_code == 200


async def test_errors_of_the_router_have_openais_form(client: httpx.AsyncClient) -> None:
    check(await client.get("/nothing/here"), 404)
    check(await client.get(PATH), 405)
    check(await client.post(PATH, json=OK | {"model": "huge"}), 404)


# ----------------------------------------------------------------------------------- over TLS, and at the end


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A key and a certificate for it that nobody else has signed."""
    names = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=localhost", "-keyout", names[0], "-out", names[1]]
    subprocess.run(words, check=True, capture_output=True)
    return names


async def test_over_tls_on_a_unix_socket_it_serves_and_while_it_ends_says_so(
    tmp_path: Path, certificate: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    (key, cert), uds = certificate, str(tmp_path / "socket")
    server = Server(
        tmp_path_factory.mktemp("tls"),  # its own sockets need a short path
        *("--p-heavy", "1", "--d-heavy", "1", "--uds", uds, "--ssl-keyfile", key, "--ssl-certfile", cert),
        *("--shutdown-timeout", "60", "--disable-log-stats", "--scheduling-policy", "priority"),
        *("--max-num-active-seqs", "32", "--enable-request-id-headers"),
    )
    try:
        family = server.wait_ready().family()
        transport = httpx.AsyncHTTPTransport(uds=uds, verify=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="https://localhost", timeout=120
        ) as client:
            await _serve_and_end(server, client)
        server.gone(0, family)
    finally:
        server.end()


async def _serve_and_end(server: Server, client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
    assert (await client.post(PATH, json=OK)).json()["usage"]["completion_tokens"] == 4
    open_request = asyncio.create_task(client.post(PATH, json=LONG.body(), headers={"X-Request-Id": "last"}))
    await until_known(client, "cmpl-last")
    server.process.terminate()

    async def ending() -> bool:
        return (await client.get("/health")).status_code == 503

    await until(ending, 5, "/health says that the server ends")
    answer = await client.post(PATH, json=OK)
    check(answer, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert (await client.get("/taichi/state")).status_code == 200
    assert (await open_request).json()["usage"]["completion_tokens"] == LONG.max_tokens
