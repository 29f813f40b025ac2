"""What the guard answers at the door, and what it lets in, around an application that counts what it gets."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from taichi_serve.frontend.guard import MAX_BODY, Guard

PATH = "/v1/completions"


class Door:
    """An application behind the guard, and the bodies that got in."""

    def __init__(self, *keys: str) -> None:
        self.got: list[bytes] = []
        methods = ["GET", "POST", "PATCH"]
        app = Starlette(routes=[Route("/{rest:path}", self._take, methods=methods)], middleware=[])
        app.state.args = argparse.Namespace(api_key=list(keys) or None)
        app.add_middleware(Guard)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door")

    async def _take(self, request: Request) -> JSONResponse:
        self.got.append(await request.body())
        return JSONResponse({})

    async def post(self, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(
            PATH, content=content, headers={"content-type": "application/json", **headers}
        )


async def test_a_good_body_gets_in_as_it_is() -> None:
    door = Door()
    body = '{"prompt": "한국어 \\u2603 emoji 🙂"}'.encode()
    assert (await door.post(body)).status_code == 200
    assert door.got == [body]


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"ec_transfer_params": {}},
        {"data_parallel_rank": 0},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
        {"vllm_xargs": {"taichi": "moved"}, "stream": True},
        b'{"\\u006bv_transfer_params": {"a": 1}}',
        b'{"vllm_xargs": {"\\u0074aichi": 1}}',
    ],
    ids=str,
)
async def test_what_only_this_system_may_say_stays_outside(body: Any) -> None:
    door = Door()
    answer = await door.post(body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == 400
    assert error["message"] == f"{error['param']} cannot be set by a client."
    assert door.got == []


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "what are kv_transfer_params?"},
        {"kv_transfer_params": None},
        {"taichi": "ignored by vLLM, as every unknown word is"},
        {"vllm_xargs": {"taichi_like": 1}},
        {"vllm_xargs": ["taichi"]},
        ["kv_transfer_params"],
        b"{kv_transfer_params",
    ],
    ids=str,
)
async def test_words_that_only_look_like_it_get_in(body: Any) -> None:
    door = Door()
    assert (await door.post(body)).status_code == 200
    assert len(door.got) == 1


async def test_json_must_be_utf_8_and_other_types_need_not() -> None:
    door = Door()
    answer = await door.post(b'{"prompt": "\xff"}')
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "byte 12" in answer.json()["error"]["message"]
    assert (await door.post(b"\xff\xfe sound", **{"content-type": "audio/wav"})).status_code == 200


async def test_the_limit_is_16_mib_to_the_byte_announced_or_not() -> None:
    door = Door()

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for _ in range(size >> 20):
            yield b" " * (1 << 20)
        yield b" " * (size % (1 << 20))

    assert (await door.post(b" " * MAX_BODY)).status_code == 200
    assert (await door.post(b" " * (MAX_BODY + 1))).status_code == 413
    assert (await door.client.post(PATH, content=pieces(MAX_BODY))).status_code == 200
    answer = await door.client.post(PATH, content=pieces(MAX_BODY + 1))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == 413
    assert len(door.got) == 2


async def test_a_data_parallel_rank_in_a_header_is_refused_on_every_route_and_method() -> None:
    door = Door()
    for method, path in (("POST", PATH), ("GET", "/v1/models"), ("PATCH", "/taichi/sliders")):
        answer = await door.client.request(method, path, headers={"X-Data-Parallel-Rank": "1"})
        assert answer.status_code == 400
    assert door.got == []


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("Bearer right", 200),
        ("Bearer other", 200),
        ("Bearer wrong", 401),
        ("right", 401),
        ("Bearer ", 401),
        (None, 401),
    ],
)
async def test_our_routes_ask_for_one_of_the_keys(sent: str | None, status: int) -> None:
    door = Door("right", "other")
    headers = {} if sent is None else {"Authorization": sent}
    for path in ("/taichi/state", "/taichi/requests/x"):
        assert (await door.client.get(path, headers=headers)).status_code == status


async def test_without_keys_our_routes_are_open_and_vllms_are_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert (await Door().client.get("/taichi/state")).status_code == 200
    assert (await Door("right").client.get("/v1/models")).status_code == 200
