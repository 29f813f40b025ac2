"""What clients are told while no instance is up: seconds by hand."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")


from taichi_serve.cluster.vllm.server.supervisor import Supervisor
from taichi_serve.frontend.attendance import Attendance


class Two:
    """Two instances, who lives, and who is silent."""

    def __init__(self, restarts: int = 10) -> None:
        self.engines = [SimpleNamespace(name=f"i{k}", alive=True) for k in range(2)]
        self.supervisor = Supervisor(["i0", "i1"], restarts, took=30.0)
        self.keeper = SimpleNamespace(supervisor=self.supervisor, silent=[])
        cluster: Any = SimpleNamespace(engines=self.engines)
        keeper: Any = self.keeper
        self.attendance = Attendance(cluster, keeper)

    def lose(self, *indices: int) -> None:
        for index in indices:
            self.engines[index].alive = False
            self.supervisor.lost(f"i{index}", "killed", time.monotonic())


def test_while_one_lives_nobody_is_refused() -> None:
    two = Two()
    two.lose(0)
    assert not two.attendance.none_lives()
    assert two.attendance.retry_after() is None


def test_when_none_lives_a_client_is_told_when_one_is_expected() -> None:
    two = Two()
    two.lose(0, 1)
    assert two.attendance.none_lives()
    assert two.attendance.retry_after() == 30
    refusal = two.attendance.refusal()
    assert refusal.http_status == 503
    assert str(refusal) == "No instance is up; one is expected back in about 30 s."


def test_when_none_will_come_back_that_is_said() -> None:
    two = Two(restarts=0)
    two.lose(0, 1)
    assert two.attendance.retry_after() is None
    assert str(two.attendance.refusal()) == "No instance is up; none will come back."


def test_silent_ones_live_and_do_not_answer() -> None:
    two = Two()
    two.lose(0)
    two.keeper.silent.append(two.engines[1])
    assert two.attendance.none_answers()
    assert not two.attendance.none_lives()


def test_whether_requests_are_taken_is_said_with_the_reason_why_not() -> None:
    two = Two()
    assert two.attendance.unready() is None
    two.lose(0)
    assert two.attendance.unready() is None
    two.keeper.silent.append(two.engines[1])
    assert two.attendance.unready() == "No instance answers at present."
    two.lose(1)
    assert two.attendance.unready() == "No instance is up; one is expected back in about 30 s."
