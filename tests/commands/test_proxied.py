"""vLLM's own servers behind a proxy: what it asks of whom. The servers are made by hand."""

from __future__ import annotations

import json
import os

import httpx
import pytest

from taichi_serve.commands.gpus import VISIBLE
from taichi_serve.commands.proxied import SIDE_PORT, Proxy, environment, groups, parsed, prefill_body
from taichi_serve.commands.stock import BINDING, KV_SPACE

PARAMETERS = {"remote_engine_id": "e", "remote_block_ids": [3, 4], "do_remote_prefill": True}
BODY = {
    "model": "m",
    "prompt": [1, 2],
    "max_tokens": 9,
    "stream": True,
    "stream_options": {"include_usage": True},
}


async def events():
    """As they come, one by one."""
    yield b'data: {"choices": []}\n\n'
    yield b"data: [DONE]\n\n"


class Servers:
    """Remember what they are asked; those that prefill give KV parameters, the others two events."""

    def __init__(self, status=200):
        self.asked, self.status = [], status

    def __call__(self, request):
        if request.method == "GET":
            return httpx.Response(200, json={"from": request.url.host})
        body = json.loads(request.content)
        self.asked.append((request.url.host, request.headers["x-request-id"], body))
        if request.url.host.startswith("p"):
            return httpx.Response(self.status, json={"kv_transfer_params": PARAMETERS})
        return httpx.Response(200, content=events(), headers={"content-type": "text/event-stream"})


async def asked(servers, *bodies, prefill=("http://p0", "http://p1"), decode=("http://d0",)):
    """The answers of a proxy before these."""
    async with httpx.AsyncClient(transport=httpx.MockTransport(servers)) as inner:
        proxy = Proxy(prefill, decode, inner)
        transport = httpx.ASGITransport(proxy.application())
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return [await client.post("/v1/completions", json=body) for body in bodies] or [
                await client.get("/v1/models")
            ]


def test_of_the_server_that_prefills_one_token_is_asked_and_its_kv():
    made = prefill_body(BODY | {"min_tokens": 9})
    assert (made["max_tokens"], made["min_tokens"], made["stream"]) == (1, 1, False)
    assert "stream_options" not in made
    assert made["kv_transfer_params"]["do_remote_decode"] is True
    assert made["prompt"] == [1, 2]
    assert BODY["max_tokens"] == 9


async def test_the_server_that_decodes_gets_the_request_as_it_was_with_the_parameters_of_the_other():
    servers = Servers()
    (answer,) = await asked(servers, BODY)
    (first, name, _), (second, other, body) = servers.asked
    assert (first, second) == ("p0", "d0")
    assert name == other
    assert body == BODY | {"kv_transfer_params": PARAMETERS}
    assert answer.text.endswith("data: [DONE]\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_servers_of_a_kind_take_turns():
    servers = Servers()
    await asked(servers, BODY, BODY, BODY)
    assert [host for host, *_ in servers.asked] == ["p0", "d0", "p1", "d0", "p0", "d0"]


async def test_where_none_prefills_for_others_a_request_goes_to_the_next_one_as_it_is():
    servers = Servers()
    await asked(servers, BODY, BODY, BODY, prefill=(), decode=("http://d0", "http://d1"))
    assert [host for host, *_ in servers.asked] == ["d0", "d1", "d0"]
    assert [body for *_, body in servers.asked] == [BODY] * 3


async def test_what_the_first_one_refuses_goes_to_no_other():
    servers = Servers(status=503)
    (answer,) = await asked(servers, BODY)
    assert answer.status_code == 503
    assert [host for host, *_ in servers.asked] == ["p0"]


async def test_which_model_is_served_says_one_that_decodes():
    (answer,) = await asked(Servers())
    assert answer.json() == {"from": "d0"}


def test_each_server_has_its_own_gpus_cores_and_side_channel(monkeypatch):
    monkeypatch.delenv(BINDING, raising=False)
    monkeypatch.delenv(KV_SPACE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3})
    first, second = (environment(number, 2, 5600 + number, f"{number}") for number in (0, 1))
    assert (first[VISIBLE], second[VISIBLE]) == ("0", "1")
    assert (first[BINDING], second[BINDING]) == ("2", "3")
    assert (first[SIDE_PORT], second[SIDE_PORT]) == ("5600", "5601")


def test_gpus_are_given_one_after_the_other_unless_they_are_said(monkeypatch):
    monkeypatch.delenv(VISIBLE, raising=False)
    assert groups(None, 2, 2) == ["0,1", "2,3"]
    monkeypatch.setenv(VISIBLE, "4,5,6,7")
    assert groups(None, 2, 2) == ["4,5", "6,7"]
    assert groups("0;0", 2, 1) == ["0", "0"]


def test_flags_that_are_not_its_own_are_for_every_server():
    words = "--model m --dtype float32 --enforce-eager --instances 4 --prefill 2 --port 1"
    ranks = "--tensor-parallel-size", "2"
    args, flags = parsed([*words.split(), *ranks, "--compilation-config", '{"mode": 0}'])
    assert (args.model, args.instances, args.prefill, args.tensor_parallel_size) == ("m", 4, 2, 2)
    assert flags == ["--dtype", "float32", "--enforce-eager", "--compilation-config", '{"mode": 0}']
    with pytest.raises(SystemExit):
        parsed(["--model", "m"])
