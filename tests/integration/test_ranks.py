"""Instances of two tensor-parallel ranks each: every rank copies its own part of the KV, also to its host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from load import moves, streamed, streamed_and_moved, view, wishes, wrong
from servers import Server

WISHES = wishes(8, seed=3, prompt=(200, 900), output=(64, 96))
TIMES = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--d-heavy", "2", "--tensor-parallel-size", "2", "--kv-offloading-size", "0.25")
    server = Server(tmp_path_factory.mktemp("ranks"), *flags, env={"VLLM_SERVER_DEV_MODE": "1"})
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


async def test_each_rank_finds_its_part_on_the_host_again(ranks: Server) -> None:
    async with ranks.client() as client:
        before = await streamed(client, WISHES)
        ranks.quiet()
        assert (await client.post("/reset_prefix_cache")).status_code == 200
        again = await streamed(client, WISHES)
        assert wrong(again, before) == []
        rows = [(await view(client, answer.id))["log"] for answer in again]
    loaded = [next(row for row in log if row["type"] == "Prefilled").get("loaded", 0) for log in rows]
    assert sum(tokens > 0 for tokens in loaded) >= len(WISHES) // 2
    assert ranks.quiet()["requests"]["failed"] == 0
