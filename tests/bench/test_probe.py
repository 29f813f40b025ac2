"""The probe of the machine's speed: real work on real cores, and nothing left of it."""

from __future__ import annotations

import os

import pytest

from taichi_serve.bench.probe import Probe, drift, spread


def test_drift_is_the_highest_over_the_lowest() -> None:
    assert drift([10.0, 10.5, 9.5]) == pytest.approx(10.5 / 9.5 - 1)
    assert drift([10.0]) == drift([]) == 0.0


def test_of_many_cores_some_are_probed_evenly_spread() -> None:
    assert spread(range(4)) == [0, 1, 2, 3]
    assert spread(range(64), most=4) == [0, 16, 32, 48]


def test_a_probe_says_a_speed_each_time_it_is_asked_and_leaves_nothing() -> None:
    with Probe.start() as probe:
        assert len(probe.workers) == min(8, len(os.sched_getaffinity(0)))
        speeds = [probe.speed() for _ in range(2)]
    assert all(0.5 < speed < 1000 for speed in speeds)
    assert all(worker.returncode is not None for worker in probe.workers)


def test_a_probe_whose_worker_is_gone_says_so() -> None:
    with Probe.start() as probe:
        probe.workers[0].kill()
        probe.workers[0].wait()
        with pytest.raises(RuntimeError, match="has ended"):
            probe.speed()
