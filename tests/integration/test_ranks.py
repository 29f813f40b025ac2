"""Instances of two tensor-parallel ranks each: every rank copies its own part of the KV."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from load import moves, streamed, streamed_and_moved, wishes
from servers import Server

WISHES = wishes(8, seed=3, prompt=(200, 900), output=(64, 96))
TIMES = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("ranks"), "--d-heavy", "2", "--tensor-parallel-size", "2")
    try:
        yield server.wait_ready()
        server.stop()
    finally:
        server.end()


async def test_a_request_on_two_ranks_moves_with_the_kv_of_both(ranks: Server) -> None:
    async with ranks.client() as client:
        unmoved = await streamed(client, WISHES)
        results = await streamed_and_moved(client, WISHES, seed=3, times=TIMES)
    assert [answer.error for answer in unmoved if not answer.ok] == []
    assert [
        i for i, ((a, _), r) in enumerate(zip(results, unmoved, strict=True)) if a.tokens != r.tokens
    ] == []
    assert all(moves(legs) for _, legs in results)
    state = ranks.quiet()
    assert state["kv_paths"] == {"i0 -> i1": "direct", "i1 -> i0": "direct"}
    assert sum(instance["late_kv"] for instance in state["instances"]) == 0
    assert state["moves"]["recomputes"] == 0
