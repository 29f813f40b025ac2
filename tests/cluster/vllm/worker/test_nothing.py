"""Steps in which no KV is read or held: what the workers are told with them, and what they look at."""

from __future__ import annotations

import pickle
from queue import SimpleQueue
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from taichi_serve.cluster.vllm.nothing import NOTHING, is_nothing
from taichi_serve.cluster.vllm.wire import Given, Orders, Return
from taichi_serve.cluster.vllm.worker.connector import LOOK_AT_LEAST, FlowConnectorWorker

FIELDS = sorted(vars(NixlConnectorMetadata()).keys() - {"scheduler_clock"})


def test_nothing_travels_by_its_name_and_is_the_same_there() -> None:
    assert pickle.loads(pickle.dumps(NOTHING)) is NOTHING  # noqa: S301 - as vLLM does
    assert len(pickle.dumps(NOTHING)) < 100


def test_a_clock_alone_says_nothing() -> None:
    meta = NixlConnectorMetadata()
    meta.scheduler_clock = 12.5
    assert is_nothing(meta, Orders([], []))


@pytest.mark.parametrize("name", FIELDS)
def test_whatever_vllm_says_is_something(name: str) -> None:
    meta = NixlConnectorMetadata()
    of = getattr(meta, name)
    of.add("a") if isinstance(of, set) else of.update(a=1)
    assert not is_nothing(meta, Orders([], []))


@pytest.mark.parametrize("orders", [Orders([Return("a")], []), Orders([], [Given("a", [1], 0)])])
def test_orders_for_the_copier_are_something(orders: Orders) -> None:
    assert not is_nothing(NixlConnectorMetadata(), orders)


class Worker(FlowConnectorWorker):
    """Our side of a worker without agents, and how often vLLM's side was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self._unseen = 0
        self._in_step: set[str] = set()
        self._copier = None
        self._recving_metadata: dict[str, Any] = {}
        self._recving_transfers: dict[str, Any] = {}
        self._recv_failures: set[str] = set()
        self._reqs_to_send: dict[str, float] = {}
        self._reqs_to_process: set[str] = set()
        self._failed_recv_reqs: Any = SimpleQueue()
        monkeypatch.setattr(NixlPullConnectorWorker, "get_transfer_results", self._look)

    def _look(self, _: object = None) -> KVConnectorTransferResults:
        self.looks += 1
        return KVConnectorTransferResults(finished_sending={"left"})


def test_while_nothing_is_read_or_held_peers_are_listened_to_once_in_a_hundred_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(monkeypatch)
    results = [worker.get_transfer_results() for _ in range(2 * LOOK_AT_LEAST)]
    assert worker.looks == 2
    assert [k for k, one in enumerate(results, 1) if one.finished_sending] == [100, 200]


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("_recving_metadata", {"a": None}),
        ("_recving_transfers", {"a": []}),
        ("_recv_failures", {"a"}),
        ("_reqs_to_send", {"a": 1.0}),
        ("_reqs_to_process", {"a"}),
    ],
)
def test_what_is_read_or_held_is_looked_after_in_every_step(
    where: str, what: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(monkeypatch)
    setattr(worker, where, what)
    assert worker.get_transfer_results().finished_sending == {"left"}
    setattr(worker, where, type(what)())
    assert worker.get_transfer_results().finished_sending == set()


def test_a_read_that_failed_beside_the_step_is_looked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch)
    worker._failed_recv_reqs.put("a")
    assert worker.get_transfer_results().finished_sending == {"left"}
