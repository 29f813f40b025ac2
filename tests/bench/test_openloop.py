"""The load against a server that answers from memory."""

import asyncio
import json

import httpx
import pytest

from taichi_serve.bench.endpoint import Endpoint, EndpointError, EndpointGoneError, meet
from taichi_serve.bench.openloop import OpenLoop, Plan
from taichi_serve.bench.score import Score
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.slo import SLO

PROMISE = SLO(ttft=30.0, tpot=30.0)


class Server(httpx.AsyncBaseTransport):
    """Answers once `least` requests are there: whoever waits for an answer before the next waits for ever."""

    def __init__(self, least=0, status=200):
        self.least, self.status = least, status
        self.bodies = []
        self.cut = 0
        self.enough = asyncio.Event()

    async def handle_async_request(self, request):
        if request.url.path == "/taichi/state":
            return httpx.Response(200, json={"requests": {"live": 0}})
        body = json.loads(await request.aread())
        self.bodies.append(body)
        if len(self.bodies) >= self.least:
            self.enough.set()
        return httpx.Response(self.status, stream=Tokens(self, body["max_tokens"]))


class Tokens(httpx.AsyncByteStream):
    def __init__(self, server, count):
        self.server, self.count = server, count

    async def __aiter__(self):
        try:
            await self.server.enough.wait()
        except asyncio.CancelledError:
            self.server.cut += 1
            raise
        for number in range(self.count):
            finish = "length" if number + 1 == self.count else None
            choice = {"text": "x", "token_ids": [7], "finish_reason": finish}
            yield f"data: {json.dumps({'id': 'a', 'choices': [choice]})}\n\n".encode()
        usage = {"prompt_tokens": 3, "completion_tokens": self.count}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()


async def loaded(server, score, calls, warm_up=0, early=False):
    async with httpx.AsyncClient(transport=server, base_url="http://server") as client:
        loop = OpenLoop(Endpoint(client, "tiny", 4096, "0"))
        await loop.run(Plan(0, calls, warm_up), score, early, lambda score: None)
    return score


async def test_arrivals_never_wait_for_answers():
    server = Server(least=50)
    score = await loaded(server, Score(PROMISE, 50, 0.9), [Call(0.0, 3, 2)] * 50)
    assert (score.sent, score.good) == (50, 50)


async def test_a_request_asks_for_exactly_the_lengths_of_its_call():
    server = Server()
    await loaded(server, Score(PROMISE, 2, 1.0), [Call(0.0, 3, 2), Call(0.0, 40, 5)])
    assert sorted((len(b["prompt"]), b["max_tokens"], b["ignore_eos"]) for b in server.bodies) == [
        (3, 2, True),
        (40, 5, True),
    ]


async def test_warm_up_requests_are_sent_and_not_counted():
    server = Server()
    score = await loaded(server, Score(PROMISE, 3, 1.0), [Call(0.0, 3, 2)] * 5, warm_up=2)
    assert (len(server.bodies), score.sent, score.good) == (5, 3, 3)


async def test_refused_requests_are_sent_and_bad():
    score = await loaded(Server(status=503), Score(PROMISE, 3, 0.9), [Call(0.0, 3, 2)] * 3)
    assert (score.sent, score.bad, score.kept) == (3, 3, False)


async def test_a_decided_rate_closes_the_connections_that_are_open():
    server = Server(least=1000)  # never
    score = Score(SLO(ttft=0.01, tpot=1.0), 100, 0.9)
    calls = [Call(0.0, 3, 2)] * 20 + [Call(3600.0, 3, 2)] * 80
    await loaded(server, score, calls, early=True)
    assert (score.kept, score.sent, server.cut, score.live) == (False, 20, 20, {})


async def test_a_whole_run_does_not_wait_for_what_can_only_be_bad():
    server = Server(least=1000)  # never
    score = await loaded(server, Score(SLO(0.01, 1.0), 4, 0.9), [Call(0.0, 3, 2)] * 4)
    assert (score.bad, server.cut) == (4, 4)


STATE = {"instances": [{"name": "i0", "alive": True, "pid": 7}, {"name": "i1", "alive": False, "pid": 8}]}


@pytest.mark.parametrize(
    ("answer", "instances"),
    [
        (httpx.Response(200, json=STATE), {"i0": 7, "i1": None}),
        (httpx.Response(404), {}),
        (httpx.Response(200, json=[]), {}),
        (httpx.Response(200, content=b"<html>"), {}),
    ],
)
async def test_instances_are_those_of_a_server_of_ours(answer, instances):
    transport = httpx.MockTransport(lambda request: answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        assert await Endpoint(client, "tiny", 4096, "0").instances() == instances


async def test_a_server_that_is_gone_is_named():
    def gone(request):
        raise httpx.ConnectError("refused")

    async with httpx.AsyncClient(transport=httpx.MockTransport(gone), base_url="http://server") as client:
        with pytest.raises(EndpointGoneError, match="http://server: it is gone"):
            await Endpoint(client, "tiny", 4096, "0").settle()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://", "http://127.0.0.1:99999"])
async def test_a_server_that_cannot_be_reached_is_named(url):
    with pytest.raises(EndpointError, match=f"^{url}: "):
        async with meet(url, None):
            pass
