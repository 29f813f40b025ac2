"""What each instance, and each pair, is asked before users are served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from instances import instance

from taichi_serve.cluster.vllm.server.warm import LOGPROBS, OUTPUT, meet


class Cluster:
    """Every rehearsal succeeds at once, and is noted: from where, to where, how many logprobs it wants."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, int | None]] = []

    def rehearse(self, request: Any, at: Any, to: Any) -> asyncio.Future[int]:
        self.asked.append((at.name, to.name if to else None, request.sampling_params.logprobs))
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        done.set_result(OUTPUT)
        return done

    def abandon(self, request_id: str, cancelled: bool) -> None:
        raise AssertionError("nothing was late")


async def test_every_instance_computes_logprobs_and_every_pair_moves_without_them(tmp_path: Path) -> None:
    cluster, one, two = Cluster(), instance(tmp_path, 0), instance(tmp_path, 1)
    await meet(cluster, [one, two], [(one, two), (two, one)])
    first, second = LOGPROBS
    moves = [("i0", "i1", None), ("i1", "i0", None)]
    assert cluster.asked == [
        *[*moves, ("i0", None, first), ("i1", None, first)],
        *[*moves, ("i0", None, second), ("i1", None, second)],
    ]
