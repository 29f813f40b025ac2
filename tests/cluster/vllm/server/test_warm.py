"""What each instance, and each pair, is asked before users are served."""

from __future__ import annotations

import asyncio
from itertools import permutations
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


async def test_who_does_not_say_whose_memory_it_reads_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silence(method: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("taichi_serve.cluster.vllm.server.engine.LOOK_SECONDS", 0.01)
    one = instance(tmp_path, 0)
    one.process.direct = set()
    monkeypatch.setattr(one.client, "call_utility_async", silence)
    await asyncio.wait_for(meet(Cluster(), [one], []), 10)
    assert one.process.direct == set()


HANDSHAKE = 0.015  # seconds; a twentieth of a real one over a network
MANY = 64


class Network(Cluster):
    """Links that are pretended: a reader shakes hands with one source at a time, the first time it reads from
    it, as vLLM's worker does; later moves are over at once."""

    def __init__(self) -> None:
        super().__init__()
        self.shaking = 0
        self.most = 0  # handshakes at one time
        self._met: set[tuple[str, str]] = set()
        self._free: dict[str, asyncio.Lock] = {}

    def rehearse(self, request: Any, at: Any, to: Any) -> asyncio.Future[int]:
        return asyncio.ensure_future(self._move(at.name, to.name if to else at.name))

    async def _move(self, source: str, reader: str) -> int:
        if source != reader and (source, reader) not in self._met:
            async with self._free.setdefault(reader, asyncio.Lock()):
                self.shaking += 1
                self.most = max(self.most, self.shaking)
                await asyncio.sleep(HANDSHAKE)
                self.shaking -= 1
                self._met.add((source, reader))
        return OUTPUT


async def test_64_instances_meet_side_by_side_and_the_4032_pairs_do_not_stand_in_line(tmp_path: Path) -> None:
    """Each reader has 63 handshakes; all readers have theirs at the same time. With real ones of 0.3 s that
    is 19 s, of the 30 that it may take."""
    engines = [instance(tmp_path, index) for index in range(MANY)]
    network = Network()
    await meet(network, engines, list(permutations(engines, 2)))
    assert network.most == MANY
