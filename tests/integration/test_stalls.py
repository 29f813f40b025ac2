"""A process that stood still for longer than anybody would wait makes no wrong token, then or afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from conftest import OVER_NIXL
from servers import Server
from stalls import FLAGS, SCARCE, WISHES, said, stall

CASES = {"target worker": (), "server": OVER_NIXL}
SECONDS = 35.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """One of two instances for each case."""
    started = {
        victim: Server(tmp_path_factory.mktemp("stalls"), *FLAGS, *SCARCE, *more)
        for victim, more in CASES.items()
    }
    try:
        yield {victim: server.wait_ready() for victim, server in started.items()}
    finally:
        for server in started.values():
            server.end()


@pytest.fixture(scope="module")
def reference(single: Server) -> list[list[int]]:
    """What one instance says."""
    return [answer.tokens for answer in asyncio.run(said(single, WISHES))]


async def test_every_stream_is_that_of_an_undisturbed_run(
    servers: dict[str, Server], reference: list[list[int]]
) -> None:
    outcomes = await asyncio.gather(*(stall(servers[v], v, SECONDS, reference) for v in CASES))
    for victim, outcome in zip(CASES, outcomes, strict=True):
        assert (victim, outcome.wrong, outcome.wrong_again) == (victim, [], [])
        assert outcome.longest_gap > SECONDS / 2, f"{victim}: nobody noticed"
        servers[victim].quiet(20)
