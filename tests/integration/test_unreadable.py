"""Where every third read of a peer's memory fails, no user gets an error, and none a wrong token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from load import moves, streamed, streamed_and_moved, wishes
from servers import Server

WISHES = wishes(32, seed=5, prompt=(200, 900), output=(64, 128))
FAULTS = Path(__file__).parent / "faults"
TIMES = 3


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("unreadable"), "--d-heavy", "2", env={"PYTHONPATH": str(FAULTS)})
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.end()


async def test_where_kv_cannot_be_read_tokens_are_computed_again_and_are_the_same(
    unreadable: Server, single: Server
) -> None:
    async with single.client() as client:
        reference = await streamed(client, WISHES)
    async with unreadable.client() as client:
        results = await asyncio.wait_for(streamed_and_moved(client, WISHES, seed=5, times=TIMES), 300)
    assert [answer.error for answer, _ in results if not answer.ok] == []
    wrong = [i for i, ((a, _), r) in enumerate(zip(results, reference, strict=True)) if a.tokens != r.tokens]
    assert wrong == [], [results[i][1] for i in wrong]

    state = unreadable.quiet()
    assert state["requests"]["failed"] == 0
    assert sum(moves(legs) for _, legs in results) > 0
    assert sum(instance["late_kv"] for instance in state["instances"]) > 0, "no read failed in a step"
    logs = [p.read_text(errors="replace") for p in unreadable.directory.glob("taichi-*/i*.log")]
    assert any("could not be read: [Errno 3]" in log for log in logs), "the kernel refused nothing"
