"""An instance is in a cluster or it is not: whatever goes wrong as it enters leaves nothing of it there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from instances import instance

from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.membership import Membership
from taichi_serve.messages import Event


class Members(Membership):
    """Keeps what it tells the scheduler."""

    def __init__(self, engines: list[Engine]) -> None:
        super().__init__(engines)
        self.told: list[Event] = []

    def tell(self, event: Event) -> None:
        self.told.append(event)


class Deaf(Engine):
    """It cannot be told to say what it caches."""

    def follow(self, hasher: object) -> None:
        raise OSError("no such socket")


@pytest.fixture
async def cluster(tmp_path: Path) -> Members:
    return Members([instance(tmp_path, 0), instance(tmp_path, 1)])


def deaf(directory: Path, index: int) -> Engine:
    one = instance(directory, index, 2)
    return Deaf(index, one.name, one.process, one.client, one.copiers, one.kind, one.chunk)


async def test_one_that_cannot_be_added_is_not_there(cluster: Members, tmp_path: Path) -> None:
    engine = deaf(tmp_path, 2)
    with pytest.raises(OSError, match="no such socket"):
        cluster.add(engine, None)
    assert [one.name for one in cluster.engines] == ["i0", "i1"]
    assert not cluster.serves(engine)
    assert cluster.told == []


async def test_one_that_cannot_come_back_takes_nobodys_place(cluster: Members, tmp_path: Path) -> None:
    before, engine = cluster.engines[1], deaf(tmp_path, 1)
    with pytest.raises(OSError, match="no such socket"):
        cluster.join(engine)
    assert cluster.engines[1] is before
    assert cluster.serves(before)
    assert cluster.told == []
