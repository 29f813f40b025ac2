"""An instance that is killed in any phase of a request's journey costs no token, and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from kills import THREE, VICTIMS, kill, loaded
from load import streamed, wishes
from servers import Server

# Prompts of several chunks, so that KV travels ahead.
WISHES = wishes(16, seed=5, prompt=(100, 1500), output=(60, 200))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("killed"), *THREE)
    try:
        yield server.wait_ready()
        server.stop(logs_stay=True)
    finally:
        server.end()


@pytest.fixture(scope="module")
def reference(single: Server) -> list[list[int]]:
    """What one instance says."""

    async def run() -> list[list[int]]:
        async with single.client() as client:
            return [answer.tokens for answer in await streamed(client, WISHES)]

    return asyncio.run(run())


@pytest.mark.parametrize("phase", VICTIMS)
async def test_an_instance_killed_in_a_phase_costs_no_token_and_is_back_within_a_minute(
    three: Server, reference: list[list[int]], phase: str
) -> None:
    for victim in VICTIMS[phase]:
        before = three.quiet(40)["requests"]
        async with loaded(three, WISHES, reference) as load:
            await kill(load, victim, phase)
        assert load.wrong == []
        after = three.quiet(40)["requests"]  # KV is at its base level
        assert after["failed"] == before["failed"]
        assert after["finished"] - before["finished"] == load.streams
        assert after["accepted"] == sum(after[how] for how in ("finished", "cancelled", "failed"))
