"""Naps between two looks into a queue of another process."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from taichi_serve.cluster.vllm.naps import NAP, SLACK, nap_between_looks

PR_GET_TIMERSLACK = 30


def test_a_reader_sleeps_and_the_kernel_wakes_it_in_time() -> None:
    def reader() -> tuple[float, int]:
        ring = SimpleNamespace()
        nap_between_looks(ring)
        began = time.thread_time(), time.monotonic()
        for _ in range(100):
            ring.sched_yield()
        assert time.monotonic() - began[1] >= 100 * NAP
        return time.thread_time() - began[0], ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK)

    with ThreadPoolExecutor(1) as pool:  # a thread of its own: what it may be late by stays with it
        used, slack = pool.submit(reader).result()
    assert used < 100 * NAP  # of its processor: it would use all of it if it did not sleep
    assert slack == SLACK
