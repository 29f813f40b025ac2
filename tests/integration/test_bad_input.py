"""Whatever somebody sends: an error in OpenAI's form, nothing disturbed, and the next request is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from conftest import API_KEY
from load import PATH, Wish, completed, instances_of
from servers import Server, until

from taichi_serve.bench.client import stream

CHAT = "/v1/chat/completions"
OK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0}
CHAT_OK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
MIB = 1 << 20


@dataclass(frozen=True)
class Bad:
    """One bad request, the status it must get, and a word that its message must have."""

    why: str
    method: str
    path: str
    body: Any
    status: int
    says: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def completion(why: str, status: int, says: str = "", **wrong: Any) -> Bad:
    return Bad(why, "POST", PATH, OK | wrong, status, says)


def sliders(why: str, says: str, **wrong: Any) -> Bad:
    return Bad(why, "PATCH", "/taichi/sliders", wrong, 400, says)


CASES = [
    Bad("malformed JSON", "POST", PATH, b'{"model": "tiny", "prompt": ', 400),
    Bad("malformed JSON in chat", "POST", CHAT, b"{]", 400),
    Bad("not an object", "POST", PATH, [1, 2], 400),
    Bad("not UTF-8", "POST", PATH, b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
    Bad("no body", "POST", PATH, b"", 400),
    Bad("no messages", "POST", CHAT, {"model": "tiny"}, 400),
    Bad("a role that is a number", "POST", CHAT, CHAT_OK | {"messages": [{"role": 1, "content": "x"}]}, 400),
    completion("max_tokens is a word", 400, max_tokens="many"),
    completion("max_tokens is negative", 400, max_tokens=-1),
    completion("temperature is negative", 400, temperature=-1),
    completion("top_p is above one", 400, top_p=2),
    completion("prompt is a number", 400, prompt=5),
    completion("prompt is an object", 400, prompt={"text": "x"}),
    completion("a token that the model has not", 400, prompt=[1, 2, 99999]),
    completion("unknown model", 404, model="huge"),
    completion("prompt over the limit", 400, prompt=[7] * 4097),
    completion("empty prompt", 400, prompt=""),
    completion("empty list of tokens", 400, prompt=[]),
    completion(
        "kv_transfer_params", 400, "kv_transfer_params", kv_transfer_params={"do_remote_decode": True}
    ),
    completion("ec_transfer_params", 400, "ec_transfer_params", ec_transfer_params={"a": 1}),
    completion(
        "ec_transfer_params, streaming", 400, "ec_transfer_params", ec_transfer_params={"a": 1}, stream=True
    ),
    completion(
        "kv_transfer_params in xargs", 400, "kv_transfer_params", vllm_xargs={"kv_transfer_params": "x"}
    ),
    completion(
        "ec_transfer_params in xargs", 400, "ec_transfer_params", vllm_xargs={"ec_transfer_params": "x"}
    ),
    completion("our own key in xargs", 400, "taichi", vllm_xargs={"taichi": "x"}),
    completion("our own key in xargs, streaming", 400, "taichi", vllm_xargs={"taichi": "x"}, stream=True),
    Bad(
        "kv_transfer_params in chat",
        "POST",
        CHAT,
        CHAT_OK | {"kv_transfer_params": {"a": 1}},
        400,
        "kv_transfer",
    ),
    Bad(
        "its name written with escapes",
        "POST",
        PATH,
        json.dumps(OK | {"ec_transfer_params": {"a": 1}}).replace("ec_t", "\\u0065c_t").encode(),
        400,
        "ec_transfer",
    ),
    Bad("a data-parallel rank", "POST", PATH, OK, 400, "data-parallel", {"X-data-parallel-rank": "0"}),
    Bad(
        "a data-parallel rank in chat",
        "POST",
        CHAT,
        CHAT_OK,
        400,
        "data-parallel",
        {"x-DATA-parallel-rank": "1"},
    ),
    sliders("an empty patch", "must be an object"),
    Bad("sliders that are a list", "PATCH", "/taichi/sliders", [1], 400, "must be an object"),
    Bad("sliders that are no JSON", "PATCH", "/taichi/sliders", b"p_chunk=5", 400, "must be an object"),
    sliders("an unknown slider", "unknown slider 'r_pd'", r_pd=2),
    sliders("a negative chunk", "whole number", d_chunk=-1),
    sliders("a chunk that is a fraction", "whole number", d_chunk=2.5),
    sliders("a chunk that is a word", "whole number", d_chunk="big"),
    sliders("a chunk that is true", "whole number", d_chunk=True),
    sliders("a chunk that is null", "whole number", d_chunk=None),
    sliders("a chunk above the step budget", "at most", p_chunk=1_000_000),
    sliders("P-heavy with the smaller chunk", "must not be below", p_chunk=128),
    sliders("more instances than there are", "must stay 2", p_heavy=2),
    sliders("no instances", "at least one instance", p_heavy=0, d_heavy=0),
    sliders("nobody who prefills", "nobody could prefill", p_heavy=0, d_heavy=2, d_chunk=0),
    Bad(
        "flow of an unknown request",
        "POST",
        "/taichi/requests/cmpl-nobody/flow",
        {"to": "i1"},
        404,
        "cmpl-nobody",
    ),
    Bad("flow to an unknown instance", "POST", "/taichi/requests/cmpl-nobody/flow", {"to": "i9"}, 404, "i9"),
    Bad("flow to nowhere", "POST", "/taichi/requests/cmpl-nobody/flow", {}, 400, "to"),
    Bad("flow to a number", "POST", "/taichi/requests/cmpl-nobody/flow", {"to": 1}, 400, "to"),
    Bad(
        "flow with more words",
        "POST",
        "/taichi/requests/cmpl-nobody/flow",
        {"to": "i1", "now": True},
        400,
        "to",
    ),
    Bad("flow that is no JSON", "POST", "/taichi/requests/cmpl-nobody/flow", b"i1", 400, "to"),
    Bad("an unknown request", "GET", "/taichi/requests/cmpl-nobody", b"", 404, "cmpl-nobody"),
    Bad("drain of an unknown instance", "POST", "/taichi/instances/i9/drain", b"", 404, "i9"),
    Bad("resume of an unknown instance", "POST", "/taichi/instances/i9/resume", b"", 404, "i9"),
]


def essence(state: dict[str, Any]) -> dict[str, Any]:
    """What a bad request must leave as it was."""
    instances = [
        {k: i[k] for k in ("name", "kind", "chunk", "alive", "draining", "pid")} for i in state["instances"]
    ]
    return {
        **{k: state[k] for k in ("sliders", "slo", "policy", "requests", "bound")},
        "instances": instances,
    }


def check_form(answer: httpx.Response) -> str:
    """OpenAI's form of an error; returns its message."""
    error = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["code"] == answer.status_code
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error["message"]


@pytest.fixture
def undisturbed(hybrid: Server) -> Iterator[None]:
    """Afterwards the state is as before: nothing was accepted, counted or set."""
    before = essence(hybrid.quiet(10))
    yield
    assert essence(hybrid.quiet()) == before


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.why)
@pytest.mark.usefixtures("undisturbed")
def test_a_bad_request_gets_an_error_in_openais_form(bad: Bad, hybrid: Server) -> None:
    headers = {"Content-Type": "application/json", **bad.headers}
    answer = httpx.request(
        bad.method, hybrid.url + bad.path, content=bad.content, headers=headers, timeout=60
    )
    assert answer.status_code == bad.status, answer.text
    assert bad.says.lower() in check_form(answer).lower()


def test_after_all_of_it_a_request_is_served(hybrid: Server) -> None:
    answer = httpx.post(hybrid.url + PATH, json=OK, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 4


# ------------------------------------------------------------------------------------------ what is too large


async def first_line(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readline(), 10)


HEAD = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.usefixtures("undisturbed")
async def test_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(hybrid: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", hybrid.port)
    writer.write(f"{HEAD}Content-Length: {16 * MIB + 1}\r\n\r\n".encode())
    assert b" 413 " in await first_line(reader)
    writer.close()


@pytest.mark.usefixtures("undisturbed")
async def test_a_body_without_an_announced_length_is_refused_when_it_has_become_too_large(
    hybrid: Server,
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", hybrid.port)
    writer.write(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    answer = asyncio.create_task(first_line(reader))
    sent = 0
    while not answer.done() and sent < 64:
        writer.write(f"{MIB:x}\r\n".encode() + b" " * MIB + b"\r\n")
        sent += 1
        try:
            await writer.drain()
        except ConnectionError:
            break
        if sent > 16:
            await asyncio.wait([answer], timeout=1)
    assert b" 413 " in await answer
    assert 16 < sent < 24
    writer.transport.abort()


@pytest.mark.usefixtures("undisturbed")
def test_a_body_just_within_the_limit_reaches_vllm(hybrid: Server) -> None:
    body = json.dumps(OK | {"prompt": "x" * (15 * MIB)}).encode()
    answer = httpx.post(
        hybrid.url + PATH, content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400
    assert "413" not in check_form(answer)


# ----------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("key", [None, "wrong", API_KEY + "x", ""], ids=["none", "wrong", "longer", "empty"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", PATH),
        ("GET", "/taichi/state"),
        ("GET", "/taichi/requests/x"),
        ("GET", "/%74aichi/state"),
        ("PATCH", "/taichi/sliders"),
        ("POST", "/taichi/requests/x/flow"),
        ("POST", "/taichi/instances/i0/drain"),
    ],
)
def test_without_the_right_key_nothing_is_told_and_nothing_done(
    key: str | None, method: str, path: str, aggregation: Server
) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".strip()}
    body = None if method == "GET" else OK
    answer = httpx.request(method, aggregation.url + path, json=body, headers=headers, timeout=30)
    assert answer.status_code == 401
    assert "error" in answer.json()
    assert not any(instance["draining"] for instance in aggregation.state()["instances"])


# ----------------------------------------------------------------------------- what is over, and who leaves


async def test_a_finished_request_cannot_be_moved_and_is_remembered(hybrid: Server) -> None:
    async with hybrid.client() as client:
        await completed(client, Wish("once upon a time", 8).body(), "cmpl-finished")
        answer = await client.post("/taichi/requests/cmpl-finished/flow", json={"to": "i0"})
        assert (answer.status_code, check_form(answer)) == (409, "the request is over")
        assert await instances_of(client, "cmpl-finished")


async def test_the_last_serving_instance_cannot_be_drained(single: Server) -> None:
    async with single.client() as client:
        answer = await client.post("/taichi/instances/i0/drain")
        assert answer.status_code == 409
        assert "last one" in check_form(answer)


async def test_when_a_client_leaves_its_stream_the_kv_is_back_within_two_seconds(hybrid: Server) -> None:
    before = hybrid.quiet(10)["requests"]
    async with hybrid.client() as client:
        body = Wish([5] * 900, 3000).body(stream=True)
        async with client.stream("POST", PATH, json=body) as response:
            lines = response.aiter_lines()
            for _ in range(20):
                await anext(lines)
            assert any(i["kv_tokens"] for i in hybrid.state()["instances"])
    after = hybrid.quiet(2)["requests"]
    assert after == {**before, "accepted": before["accepted"] + 1, "cancelled": before["cancelled"] + 1}


async def test_a_request_id_that_is_used_twice_is_two_requests(hybrid: Server) -> None:
    async with hybrid.client() as client:
        wish = Wish([9, 8, 7] * 20, 40)
        one, other = await asyncio.gather(*(completed(client, wish.body(), "cmpl-twins") for _ in range(2)))
    assert one.tokens == other.tokens
    assert len(one.tokens) == 40


async def test_health_models_tokenize_and_metrics_answer(hybrid: Server) -> None:
    async with hybrid.client() as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        tokens = (await client.post("/tokenize", json={"model": "tiny", "prompt": "hello"})).json()
        assert tokens["count"] == len(tokens["tokens"]) > 0
        answer = await stream(client, CHAT, CHAT_OK)
        assert answer.ok, answer.error

        async def counted() -> bool:
            page = (await client.get("/metrics")).text
            return (
                all(
                    f'vllm:{name}{{engine="{engine}",model_name="tiny"}}' in page
                    for name in ("num_requests_running", "generation_tokens_total", "kv_cache_usage_perc")
                    for engine in (0, 1)
                )
                and "taichi_moves_total" in page
            )

        await until(counted, 5, "vLLM's metrics for each instance, and ours")
