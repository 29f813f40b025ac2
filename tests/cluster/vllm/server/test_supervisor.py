"""When a lost instance is started again, by the second."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.server.supervisor import Standing, Supervisor


def crash(supervisor: Supervisor, name: str, at: float) -> float | None:
    """It dies at `at`; where it may, it is started when it is due, and is back 20 s later."""
    delay = supervisor.lost(name, "killed", at)
    if delay is not None:
        supervisor.starting(name, at + delay)
        supervisor.back(name, at + delay + 20)
    return delay


def test_the_first_start_comes_at_once_and_each_further_one_later() -> None:
    supervisor = Supervisor(["i0"], restarts=10)
    delays = [crash(supervisor, "i0", 100.0 * k) for k in range(1, 10)]
    assert delays == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_after_so_many_starts_in_an_hour_it_stays_out() -> None:
    supervisor = Supervisor(["i0"], restarts=2)
    assert crash(supervisor, "i0", 0) is not None
    assert crash(supervisor, "i0", 100) is not None
    assert crash(supervisor, "i0", 200) is None
    assert supervisor.places["i0"].standing is Standing.OUT
    assert supervisor.returns("i0", 210) is None


def test_what_is_an_hour_ago_is_forgotten() -> None:
    supervisor = Supervisor(["i0"], restarts=2)
    crash(supervisor, "i0", 0)
    crash(supervisor, "i0", 100)
    assert crash(supervisor, "i0", 3600) == 1  # the start at 101 s is within the hour
    assert crash(supervisor, "i0", 8000) == 0


def test_a_start_that_fails_counts() -> None:
    supervisor = Supervisor(["i0"], restarts=2)
    assert supervisor.lost("i0", "killed", 0) == 0
    supervisor.starting("i0", 0)
    assert supervisor.lost("i0", "no memory", 5) == 1
    supervisor.starting("i0", 6)
    assert supervisor.lost("i0", "no memory", 11) is None
    place = supervisor.places["i0"]
    assert (place.restarts, place.why, place.lost_at) == (0, "no memory", 0)


def test_with_no_restarts_the_first_loss_is_the_last() -> None:
    supervisor = Supervisor(["i0", "i1"], restarts=0)
    assert supervisor.lost("i0", "killed", 0) is None
    assert not supervisor.hopeless
    assert supervisor.retry_after(1) == 1
    assert supervisor.lost("i1", "killed", 0) is None
    assert supervisor.hopeless
    assert supervisor.retry_after(1) is None


def test_one_instance_does_not_use_up_the_starts_of_another() -> None:
    supervisor = Supervisor(["i0", "i1"], restarts=1)
    crash(supervisor, "i0", 0)
    assert crash(supervisor, "i0", 50) is None
    assert crash(supervisor, "i1", 50) == 0


def test_it_is_expected_back_after_what_the_last_start_took() -> None:
    supervisor = Supervisor(["i0"], restarts=5, took=30.0)
    supervisor.lost("i0", "killed", 0)
    assert supervisor.returns("i0", 0) == 30
    supervisor.starting("i0", 0)
    assert supervisor.returns("i0", 12) == 18
    assert supervisor.returns("i0", 90) == 1  # late: any moment now
    supervisor.back("i0", 95)
    assert supervisor.returns("i0", 96) == 0
    supervisor.lost("i0", "killed", 100)
    assert supervisor.returns("i0", 100) == 1 + 95  # a delay of 1 s, and a start as slow as the last


def test_a_client_is_told_when_the_first_of_all_is_expected() -> None:
    supervisor = Supervisor(["i0", "i1"], restarts=5, took=30.0)
    supervisor.lost("i0", "killed", 0)
    supervisor.starting("i0", 0)
    supervisor.lost("i1", "killed", 20)
    assert supervisor.retry_after(20.5) == 10
