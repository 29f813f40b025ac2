"""More requests than can be in time, on real engines: some are best effort, the rest are turned away at the
door and told when to come back, and what was accepted is answered in full and token for token. The clients of
OpenAI and of Anthropic come back as they are told."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from load import PATH, Wish, streamed, text_of, view, wishes
from servers import Server

# A prompt takes about a tenth of a second on an instance, and the SLO is one second.
FLAGS = (
    *("--p-heavy", "1", "--d-heavy", "1", "--p-chunk", "512", "--d-chunk", "128"),
    *("--ttft-slo", "1", "--tpot-slo", "1", "--no-enable-prefix-caching"),
)
WISHES = wishes(60, seed=14, prompt=(1200, 1500), output=(8, 16))
LEARNING = wishes(12, seed=15, prompt=(1200, 1500), output=(2, 4))


@pytest.fixture(scope="module", params=["demote", "refuse"])
def crowded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that knows how fast it is."""
    server = Server(tmp_path_factory.mktemp(request.param), *FLAGS, "--overload", request.param)
    try:
        server.wait_ready()

        async def learn() -> None:
            async with server.client() as client:
                for wish in LEARNING:
                    (await client.post(PATH, json=wish.body())).raise_for_status()

        asyncio.run(learn())
        yield server
        server.stop()
    finally:
        server.end()


async def asked(client: httpx.AsyncClient, wish: Wish, streaming: bool) -> httpx.Response:
    return await client.post(PATH, json=wish.body(stream=streaming))


def at_once(server: Server, streaming: bool) -> list[httpx.Response]:
    """All of them come within a moment."""

    async def run() -> list[httpx.Response]:
        async with server.client() as client:
            return await asyncio.gather(*(asked(client, wish, streaming) for wish in WISHES))

    return asyncio.run(run())


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_who_is_turned_away_gets_503_before_the_first_byte_and_is_told_when_to_come_back(
    crowded: Server, streaming: bool
) -> None:
    answers = at_once(crowded, streaming)
    away = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in away:
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", 503)
        assert "overloaded" in error["message"]
    crowded.quiet(10.0)
    ended = crowded.state()["requests"]
    assert ended["failed"] == 0
    assert ended["refused"] >= len(away)


def test_what_is_accepted_is_answered_token_for_token(crowded: Server, single: Server) -> None:
    async def reference() -> list[list[int]]:
        async with single.client() as client:
            return [answer.tokens for answer in await streamed(client, WISHES)]

    expected = asyncio.run(reference())
    answers = at_once(crowded, streaming=False)
    accepted = [n for n, answer in enumerate(answers) if answer.status_code == 200]
    assert accepted
    wrong = [n for n in accepted if answers[n].json()["choices"][0]["token_ids"] != expected[n]]
    assert wrong == []


def test_who_comes_back_as_told_gets_in(crowded: Server) -> None:
    async def insist(client: httpx.AsyncClient, wish: Wish) -> int:
        for turn in range(200):
            answer = await asked(client, wish, streaming=False)
            if answer.status_code == 200:
                return turn
            assert answer.status_code == 503
            await asyncio.sleep(int(answer.headers["retry-after"]))  # what the client is told to wait
        raise AssertionError("it never got in")

    async def run() -> list[int]:
        async with crowded.client() as client:
            return await asyncio.gather(*(insist(client, wish) for wish in WISHES[:30]))

    turns = asyncio.run(run())
    assert max(turns) > 0


def test_the_reason_is_in_the_record(crowded: Server) -> None:
    async def histories() -> list[dict[str, Any]]:
        async with crowded.client() as client:
            names = [f"crowd-{number}" for number in range(len(WISHES))]
            heads = [{"X-Request-Id": name} for name in names]
            calls = zip(WISHES, heads, strict=True)
            await asyncio.gather(*(client.post(PATH, json=w.body(), headers=h) for w, h in calls))
            return [await view(client, f"cmpl-{name}") for name in names]

    logs = [history["log"] for history in asyncio.run(histories())]
    declined = [entry for log in logs for entry in log if entry["type"] == "Decline"]
    assert declined
    assert all("of 1 s" in entry["why"] and entry["retry_after"] > 0 for entry in declined)
    if "demote" in Path(crowded.directory).name:
        entries = [entry for log in logs for entry in log]
        late = [e for e in entries if e.get("best_effort") or e["type"] == "Demote"]
        assert late


def test_the_live_page_sees_its_first_update_at_once(crowded: Server) -> None:
    """The beginning of an answer is kept back where it may be turned away, and only there."""

    async def first() -> bytes:
        async with crowded.client() as client, client.stream("GET", "/taichi/events") as answer:
            async with asyncio.timeout(10):
                return await anext(answer.aiter_bytes())

    assert asyncio.run(first()).startswith(b"data: ")


# ------------------------------------------------------------------------------ clients that retry themselves

CLIENTS = 30
RETRIES = 100  # a client waits as long as it is told, a second at least


def texts(seed: int) -> list[str]:
    """Prompts as long as the others."""
    chance = random.Random(seed)
    return [text_of(1350, chance) for _ in range(CLIENTS)]


Came = tuple[int, float, str | None]  # retries, seconds until it was answered, why the answer ended


async def by_openais_client(url: str) -> list[Came]:
    """All at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=RETRIES) as client:

        async def one(text: str) -> Came:
            began = time.monotonic()
            said: Any = [{"role": "user", "content": text}]
            create = client.chat.completions.with_raw_response.create
            raw = await create(model="tiny", messages=said, max_tokens=4)
            return raw.retries_taken, time.monotonic() - began, raw.parse().choices[0].finish_reason

        return await asyncio.gather(*map(one, texts(21)))


async def by_anthropics_client(url: str) -> list[Came]:
    """All at once."""
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=RETRIES) as client:

        async def one(text: str) -> Came:
            began = time.monotonic()
            said: Any = [{"role": "user", "content": text}]
            create = client.messages.with_raw_response.create
            raw = await create(model="tiny", messages=said, max_tokens=4)
            return raw.retries_taken, time.monotonic() - began, (await raw.parse()).stop_reason

        return await asyncio.gather(*map(one, texts(22)))


@pytest.mark.parametrize("by_client", [by_openais_client, by_anthropics_client])
def test_a_client_that_retries_waits_as_it_is_told_and_gets_in(crowded: Server, by_client: Any) -> None:
    answers: list[Came] = asyncio.run(by_client(crowded.url))
    assert all(end is not None for _, _, end in answers)
    assert max(retries for retries, _, _ in answers) > 0
    # Of itself a client would come back after half a second; Retry-After is one at least.
    assert all(seconds >= retries for retries, seconds, _ in answers)


def test_a_client_that_does_not_retry_sees_an_error_of_its_own_api(crowded: Server) -> None:
    async def refused(client: Any, create: Any, kind: type[Exception]) -> list[Any]:
        async with client:
            calls = (create(model="tiny", messages=[{"role": "user", "content": t}]) for t in texts(23))
            answers = await asyncio.gather(*calls, return_exceptions=True)
        wrong = [answer for answer in answers if isinstance(answer, Exception)]
        assert wrong
        assert all(isinstance(one, kind) for one in wrong)
        return wrong

    ours = openai.AsyncOpenAI(base_url=f"{crowded.url}/v1", api_key="none", max_retries=0)
    for one in asyncio.run(refused(ours, ours.chat.completions.create, openai.InternalServerError)):
        assert (one.status_code, one.type) == (503, "overloaded_error")
    theirs = anthropic.AsyncAnthropic(base_url=crowded.url, api_key="none", max_retries=0)
    message = partial(theirs.messages.create, max_tokens=4)
    for one in asyncio.run(refused(theirs, message, anthropic.APIStatusError)):
        assert (one.status_code, one.body["type"]) == (503, "error")
        assert one.body["error"]["type"] == "overloaded_error"
        assert int(one.response.headers["retry-after"]) >= 1


# ------------------------------------------------------------------------------------ the bound that vLLM has

BOUND = 4


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that serves all in order, but no more than so many at a time."""
    server = Server(
        tmp_path_factory.mktemp("bounded"),
        *("--d-heavy", "1", "--overload", "serve", "--max-num-queued-reqs", str(BOUND)),
    )
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.end()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_of_more_than_vllms_bound_allows_the_rest_gets_503_before_the_first_byte(
    bounded: Server, streaming: bool
) -> None:
    answers = at_once(bounded, streaming)
    accepted = [answer for answer in answers if answer.status_code == 200]
    away = [answer for answer in answers if answer.status_code == 503]
    assert len(accepted) + len(away) == len(WISHES)
    assert accepted
    assert away
    for answer in away:
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", 503)
        assert "busy" in error["message"]
    for answer in accepted:
        assert '"error"' not in answer.text
        assert '"finish_reason":"length"' in answer.text
    assert bounded.quiet(10.0)["requests"]["failed"] == 0


def test_who_comes_when_there_is_room_again_gets_in(bounded: Server) -> None:
    assert bounded.quiet(10.0)
    few = WISHES[:BOUND]

    async def run() -> list[httpx.Response]:
        async with bounded.client() as client:
            return await asyncio.gather(*(asked(client, wish, streaming=True) for wish in few))

    assert [answer.status_code for answer in asyncio.run(run())] == [200] * BOUND
