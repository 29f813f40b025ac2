"""Traces of a real server at a collector in this process: whatever a request went through is in its one."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from collector import Collector, Seen, over_grpc, over_http
from load import PATH, Wish
from servers import Server, processes, until

from taichi_serve.bench.client import Answer, stream
from taichi_serve.ports import port_of, reserve

SERVER = f"POST {PATH}"
CHANCE = random.Random(29)
NAMES = {
    *(SERVER, "llm_request", "wait", "prefill", "queue", "compute", "fetch", "decode"),
    *("hand-over", "operator", "drain", "degrade", "backflow", "rescue"),
    *("announce", "copy ahead", "leave", "tail", "landing"),
}
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # milliseconds that spans are gathered
# Prompts go to i0 alone, and decodes begin on i1: every request is handed over.
FLAGS = ("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "256", "--d-chunk", "0")


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    with over_grpc() as made:
        yield made


@pytest.fixture(scope="module")
def collected(collector: tuple[Collector, str]) -> Collector:
    return collector[0]


@pytest.fixture(scope="module")
def server(collector: tuple[Collector, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = (*FLAGS, "--restarts", "0", "--otlp-traces-endpoint", collector[1])
    server = Server(tmp_path_factory.mktemp("traced"), *flags, env=SOON)
    try:
        yield server.wait_ready()
    finally:
        server.end()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


def caller() -> tuple[str, str, dict[str, str]]:
    """A caller's trace, its span, and the headers that carry them."""
    trace, span = f"{CHANCE.getrandbits(128):032x}", f"{CHANCE.getrandbits(64):016x}"
    return trace, span, {"traceparent": f"00-{trace}-{span}-01"}


def prompt(tokens: int) -> list[int]:
    return [CHANCE.randrange(300, 4000) for _ in range(tokens)]


def only(spans: list[Seen], name: str) -> Seen:
    (found,) = (span for span in spans if span.name == name)
    return found


def within(spans: list[Seen], parent: Seen) -> list[str]:
    """The names of the spans below this one, which lie within it."""
    below = [span for span in spans if span.parent == parent.id]
    assert all(parent.holds(span) for span in below), (parent, below)
    return [span.name for span in below]


async def moved(client: httpx.AsyncClient, wish: Wish, headers: dict[str, str], to: str) -> Answer:
    """Streamed, and sent to this instance by an operator after its twentieth token."""
    asked = False

    async def push(answer: Answer) -> None:
        nonlocal asked
        if not asked and len(answer.tokens) >= 20:
            asked = True
            (await client.post(f"/taichi/requests/{answer.id}/flow", json={"to": to})).raise_for_status()

    answer = await stream(client, PATH, wish.body(), push, headers)
    assert answer.ok, answer.error
    return answer


async def test_a_request_that_was_handed_over_and_moved_is_one_trace_with_every_part(
    client: httpx.AsyncClient, collected: Collector
) -> None:
    trace, span, headers = caller()
    began = time.time()
    answer = await moved(client, Wish(prompt(1200), 300), headers, "i0")
    spans = collected.whole(trace)
    root = only(spans, SERVER)
    assert (root.parent, root.kind, root.service) == (span, 2, "taichi")
    assert began <= root.began <= root.ended <= time.time()
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["taichi.outcome"] == "finished"
    assert root.attributes["taichi.moves"] == 2
    assert sorted(within(spans, root)) == [
        *("decode", "decode", "hand-over", "llm_request", "operator", "prefill")
    ]
    prefill, hand_over, operator = (only(spans, name) for name in ("prefill", "hand-over", "operator"))
    assert prefill.attributes["taichi.instance"] == "i0"
    assert within(spans, prefill) == ["queue", "compute"]
    assert (hand_over.attributes["taichi.from"], hand_over.attributes["taichi.to"]) == ("i0", "i1")
    assert (operator.attributes["taichi.from"], operator.attributes["taichi.to"]) == ("i1", "i0")
    assert hand_over.attributes["taichi.kv_tokens"] == 1200
    assert {"tail", "landing"} <= set(within(spans, hand_over))
    # What is not in i0's prefix cache is copied: the tokens since the prompt.
    assert within(spans, operator)[-3:] == ["leave", "tail", "landing"]
    first, second = (one for one in spans if one.name == "decode")
    assert (first.attributes["taichi.instance"], second.attributes["taichi.instance"]) == ("i1", "i0")
    assert prefill.ended <= first.began <= first.ended <= second.began <= second.ended <= root.ended
    tokens = [one.attributes["taichi.output_tokens"] for one in (first, second)]
    assert 1 + sum(tokens) == len(answer.tokens) == 300
    assert tokens[0] >= 19
    assert not [one for one in spans if one.wrong]
    assert {one.trace for one in spans} == {trace}


async def test_vllms_own_attributes_are_right_for_a_request_that_moved(
    client: httpx.AsyncClient, collected: Collector
) -> None:
    trace, _, headers = caller()
    answer = await moved(client, Wish(prompt(700), 200), headers, "i0")
    spans = collected.whole(trace)
    root, own, prefill = (only(spans, name) for name in (SERVER, "llm_request", "prefill"))
    found = {name.removeprefix("gen_ai."): value for name, value in own.attributes.items()}
    assert (own.parent, own.kind) == (root.id, 2)
    assert (found["usage.prompt_tokens"], found["usage.completion_tokens"]) == (700, 200)
    assert found["request.id"].startswith(answer.id)
    assert found["request.max_tokens"] == 200
    # To the millisecond those of a request that one instance served from its arrival to its end.
    assert found["latency.time_to_first_token"] == pytest.approx(prefill.ended - own.began, abs=0.1)
    assert found["latency.e2e"] == pytest.approx(own.seconds, abs=0.1)
    queue = only(spans, "queue")
    assert found["latency.time_in_queue"] == pytest.approx(queue.seconds, abs=0.1)
    computed = [found[f"latency.time_in_model_{part}"] for part in ("prefill", "decode", "inference")]
    assert computed[0] + computed[1] == pytest.approx(computed[2])
    last = max(one.ended for one in spans if one.name == "decode")
    assert computed[1] == pytest.approx(last - prefill.ended, abs=0.1)


async def test_without_a_caller_a_trace_begins_here_and_all_choices_are_in_it(
    client: httpx.AsyncClient, collected: Collector
) -> None:
    known = {span.trace for span in collected.spans}
    body = {**Wish(prompt(300), 12).body(), "n": 2, "temperature": 0.7}
    answer = await client.post(PATH, json=body)
    assert len(answer.json()["choices"]) == 2

    async def new() -> set[str]:
        return {span.trace for span in collected.spans} - known

    (trace,) = await until(new, 20, "a new trace is here")
    spans = collected.whole(trace)
    root = only(spans, SERVER)
    assert root.parent == ""
    assert within(spans, root).count("llm_request") == 2
    assert len({one.attributes["taichi.request"] for one in spans if one.name == "prefill"}) == 2


async def test_a_drain_is_a_move_of_each_trace(client: httpx.AsyncClient, collected: Collector) -> None:
    traces = [caller() for _ in range(3)]
    running = [
        asyncio.create_task(stream(client, PATH, Wish(prompt(200), 400).body(), None, headers))
        for *_, headers in traces
    ]

    async def decoding() -> bool:
        state = (await client.get("/taichi/state")).json()
        return any(i["decodes"] == 3 for i in state["instances"] if i["name"] == "i1")

    await until(decoding, 30, "three decodes run on i1")
    (await client.post("/taichi/instances/i1/drain")).raise_for_status()
    answers = await asyncio.gather(*running)
    (await client.post("/taichi/instances/i1/resume")).raise_for_status()
    assert all(answer.ok for answer in answers)
    for trace, *_ in traces:
        drain = only([span for span in collected.whole(trace) if not span.wrong], "drain")
        assert (drain.attributes["taichi.from"], drain.attributes["taichi.to"]) == ("i1", "i0")


async def test_a_client_that_leaves_has_a_trace_that_says_so(
    client: httpx.AsyncClient, collected: Collector
) -> None:
    trace, _, headers = caller()
    body = Wish(prompt(200), 2000).body(stream=True)
    async with client.stream("POST", PATH, json=body, headers=headers) as answer:
        events = (line async for line in answer.aiter_lines() if line.startswith("data:"))
        for _ in range(20):  # all but the first are of the instance where it decodes
            await anext(events)
    spans = collected.whole(trace)
    assert "llm_request" not in {span.name for span in spans}  # vLLM makes none of such a request

    async def told() -> bool:
        return any(span.name == "decode" for span in collected.of(trace))

    await until(told, 20, "its decode is told")
    assert not [span for span in collected.of(trace) if span.wrong]


async def test_engines_send_nothing_themselves_and_all_went_well(
    server: Server, client: httpx.AsyncClient, collected: Collector
) -> None:
    assert 'taichi_trouble_total{what="tracing"} 0.0' in (await client.get("/metrics/")).text
    assert not [line for line in server.lines() if "tracing" in line]
    assert {span.service for span in collected.spans} == {"taichi"}
    assert {span.name for span in collected.spans} <= NAMES


async def test_headroom_is_predicted_for_each_instance_and_measured_of_what_ended(
    server: Server, client: httpx.AsyncClient
) -> None:
    await stream(client, PATH, Wish(prompt(400), 20).body())
    found = server.state()["headroom"]
    assert found["prompt_tokens"] >= 200
    assert found["instances"]["i0"]["ttft"] == pytest.approx(found["predicted"]["ttft"], abs=0.2)
    assert found["instances"]["i1"]["ttft"] is None  # it takes no prompts
    assert found["predicted"]["tpot"] < 1.0
    assert found["measured"]["ttft"] < 1.0
    text = (await client.get("/metrics/")).text
    for sample in (
        'taichi_instance_headroom{engine="0",of="ttft"} ',
        'taichi_instance_headroom{engine="1",of="tpot"} ',
        'taichi_headroom{of="ttft",seen="predicted"} ',
        'taichi_headroom{of="tpot",seen="measured"} ',
    ):
        assert sample in text


async def test_a_rescue_is_in_the_trace_of_whom_it_saved(
    server: Server, client: httpx.AsyncClient, collected: Collector
) -> None:
    trace, _, headers = caller()
    killed = False

    async def kill(answer: Answer) -> None:
        nonlocal killed
        if not killed and len(answer.tokens) >= 20:
            killed = True
            processes(server, "i1")[0].kill()

    answer = await stream(client, PATH, Wish(prompt(300), 200).body(), kill, headers)
    assert answer.ok, answer.error
    spans = collected.whole(trace)
    rescue = only(spans, "rescue")
    assert (rescue.attributes["taichi.from"], rescue.attributes["taichi.to"]) == ("i1", "i0")
    assert rescue.attributes["taichi.kv_tokens"] == 0
    decodes = [span.attributes["taichi.output_tokens"] for span in spans if span.name == "decode"]
    assert 1 + sum(decodes) == 200
    assert only(spans, "llm_request").attributes["gen_ai.usage.completion_tokens"] == 200


async def test_a_collector_that_is_down_costs_one_line_and_gets_spans_when_it_is_up(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with reserve() as listens:
        endpoint = f"http://127.0.0.1:{port_of(listens)}/v1/traces"
        env = {**SOON, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
        flags = (*FLAGS, "--otlp-traces-endpoint", endpoint)
        server = Server(tmp_path_factory.mktemp("untaken"), *flags, env=env)
        try:
            await _down_and_up(server.wait_ready(), listens)
        finally:
            server.end()


async def _down_and_up(server: Server, listens: socket.socket) -> None:
    async with server.client() as client:
        answers = [await stream(client, PATH, Wish(prompt(200), 20).body()) for _ in range(5)]
        assert all(answer.ok for answer in answers)

        async def counted() -> bool:
            text = (await client.get("/metrics/")).text
            return 'taichi_trouble_total{what="tracing"} 0.0' not in text

        await until(counted, 60, "that nobody takes the spans is counted")
        with over_http(listens) as collected:
            trace, span, headers = caller()
            assert (await stream(client, PATH, Wish(prompt(200), 20).body(), None, headers)).ok
            spans = collected.whole(trace, seconds=60)
            assert only(spans, SERVER).parent == span
            assert "hand-over" in {one.name for one in spans}
    assert len([line for line in server.lines() if "tracing: " in line]) == 1, server.lines()
    trace, _, headers = caller()
    async with server.client() as client:  # nobody takes these
        assert (await stream(client, PATH, Wish(prompt(200), 20).body(), None, headers)).ok
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 20
