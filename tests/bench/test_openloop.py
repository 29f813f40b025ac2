"""The load against a server that answers from memory."""

import asyncio
import json
import time

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


class Talker(Server):
    """Answers at once, with token ids that grow from 5000, or without any."""

    def __init__(self, ids=True, status=200):
        super().__init__(status=status)
        self.ids, self.next, self.at, self.usage = ids, 5000, [], {}

    async def handle_async_request(self, request):
        if request.url.path == "/taichi/state":
            return httpx.Response(200, json={"requests": {"live": 0}})
        body = json.loads(await request.aread())
        self.bodies.append(body)
        self.at.append(time.perf_counter())
        count = body["max_tokens"]
        tokens = list(range(self.next, self.next + count))
        self.next += count
        choice = {"text": "x", "finish_reason": "length", **({"token_ids": tokens} if self.ids else {})}
        events = {"choices": [choice]}, {"choices": [], "usage": self.usage | {"completion_tokens": count}}
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(self.status, content=f"{text}data: [DONE]\n\n")


TALK = Call(
    0.0,
    40,
    4,
    blocks=(1, 2),
    then=Call(0.05, 60, 3, blocks=(1, 2, 3), then=Call(0.0, 70, 2, blocks=(1, 2, 3, 4))),
)


async def test_a_next_turn_is_sent_after_the_answer_and_the_pause_and_has_the_answers_tokens():
    server = Talker()
    score = await loaded(server, Score(PROMISE, 3, 1.0), [TALK])
    first, second, third = (body["prompt"] for body in server.bodies)
    assert second[:44] == [*first, 5000, 5001, 5002, 5003]
    assert third[:63] == [*second, 5004, 5005, 5006]
    assert [len(prompt) for prompt in (first, second, third)] == [40, 60, 70]
    assert server.at[1] - server.at[0] >= 0.05
    assert (score.sent, score.good, len(score.samples)) == (3, 3, 3)


async def test_a_conversation_goes_on_after_a_turn_that_failed():
    server = Talker(status=503)
    score = await loaded(server, Score(PROMISE, 3, 0.9), [TALK])
    assert (score.sent, score.bad) == (3, 3)
    assert [len(body["prompt"]) for body in server.bodies] == [40, 60, 70]


async def test_a_warm_up_is_of_the_first_requests_that_are_sent():
    server = Talker()
    score = await loaded(server, Score(PROMISE, 2, 0.5), [TALK, Call(3600.0, 3, 2)], warm_up=2, early=True)
    assert (score.sent, score.good, len(server.bodies)) == (1, 1, 3)


async def test_cached_tokens_are_those_that_the_server_tells():
    server = Talker()
    server.usage = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 10}}
    score = await loaded(server, Score(PROMISE, 1, 1.0), [Call(0.0, 40, 2)])
    assert score.run(1.0, 1.0).cached == 0.25


async def test_a_server_without_token_ids_is_named_where_a_next_turn_needs_them():
    with pytest.raises(EndpointError, match=r"^http://server: it does not return token ids"):
        await loaded(Talker(ids=False), Score(PROMISE, 3, 1.0), [TALK])
    score = await loaded(Talker(ids=False), Score(PROMISE, 1, 1.0), [Call(0.0, 3, 2)])
    assert score.good == 1


async def test_two_runs_have_no_token_in_common_and_two_loads_with_one_salt_have_all():
    async def sent(salt):
        server = Talker()
        async with httpx.AsyncClient(transport=server, base_url="http://server") as client:
            loop = OpenLoop(Endpoint(client, "tiny", 4096, "0"), salt)
            for _ in range(2):
                score = Score(PROMISE, 1, 1.0)
                await loop.run(
                    Plan(0, [Call(0.0, 48, 1, blocks=(1, 2, 3))]), score, False, lambda score: None
                )
        return [body["prompt"] for body in server.bodies]

    one, again, other = await sent(1), await sent(1), await sent(None)
    assert one == again
    assert one[0] != one[1]
    assert other[0] not in one


def test_the_span_of_a_plan_is_that_of_its_counted_requests():
    plan = Plan(0, [TALK, Call(1.0, 3, 2), Call(4.0, 3, 2)], warm_up=2)
    assert (plan.total, plan.span) == (5, pytest.approx(4.0 - 0.05))


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
