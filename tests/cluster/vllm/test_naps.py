"""Naps between two looks into a queue of another process."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from taichi_serve.cluster.vllm import naps
from taichi_serve.cluster.vllm.naps import NAP, SLACK, SPIN, nap_between_looks

PR_GET_TIMERSLACK = 30


class Condition:
    """vLLM's SpinCondition as far as readers know it: what came last, and when."""

    def __init__(self, last_read: float) -> None:
        self.last_read, self.busy_loop_s = last_read, 1.0
        self.bells = 0

    def wait(self, timeout_ms: int | None = None) -> None:
        self.bells += 1


def ring() -> Any:
    made = type("Ring", (), {"SpinCondition": type("SpinCondition", (Condition,), {})})
    nap_between_looks(made)
    return made


def test_a_reader_sleeps_and_the_kernel_wakes_it_in_time() -> None:
    def reader() -> tuple[float, int]:
        waits = ring().SpinCondition(time.monotonic())
        waits.wait()
        waits.taichi_until = 0.0  # it has looked for long enough
        began = time.thread_time(), time.monotonic()
        for _ in range(100):
            waits.wait()
        assert time.monotonic() - began[1] >= 100 * NAP
        return time.thread_time() - began[0], ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK)

    with ThreadPoolExecutor(1) as pool:  # a thread of its own: what it may be late by stays with it
        used, slack = pool.submit(reader).result()
    assert used < 100 * NAP  # of its processor: it would use all of it if it did not sleep
    assert slack == SLACK


@pytest.fixture
def did(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a reader did while it waited, with a clock that is set by hand."""
    found: list[str] = []
    clock: Any = type("Clock", (), {"now": 100.0, "monotonic": lambda: clock.now})
    clock.sleep = lambda seconds: found.append("nap")
    monkeypatch.setattr(naps, "time", clock)
    monkeypatch.setattr(os, "sched_yield", lambda: found.append("look"))
    found.append(clock)
    return found


def test_after_each_message_a_reader_looks_for_a_moment_before_it_naps(did: list[Any]) -> None:
    clock = did.pop()
    waits = ring().SpinCondition(last_read=99.5)
    for after in (0.0, SPIN / 2, SPIN, 2 * SPIN):
        clock.now = 100.0 + after
        waits.wait()
    assert did == ["look", "look", "nap", "nap"]
    waits.last_read = clock.now  # a message came: the next wait begins anew, when it begins
    clock.now += 10 * SPIN
    waits.wait()
    assert did[4:] == ["look"]


def test_a_reader_to_whom_nothing_came_for_a_second_waits_for_the_bell(did: list[Any]) -> None:
    clock = did.pop()
    waits = ring().SpinCondition(last_read=99.0)
    clock.now = 100.5
    waits.wait(5)
    assert (did, waits.bells) == ([], 1)
