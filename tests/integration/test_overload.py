"""More requests than can be in time, on real engines: some are best effort, the rest are turned away at the
door and told when to come back, and what was accepted is answered in full and token for token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from load import PATH, Wish, streamed, view, wishes
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
