"""A clock that stands still while the process does: ticks of a quarter of a second, by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.server.clock import Patience


class Outside:
    """The time outside."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Clock:
    """A clock, and a way to let time pass outside."""

    def __init__(self) -> None:
        self.outside = Outside()
        self.patience = Patience(self.outside)

    def passes(self, *seconds: float) -> None:
        for each in seconds:
            self.outside.now += each
            self.patience.tick()


def test_small_ticks_add_up_to_the_time_outside() -> None:
    clock = Clock()
    clock.passes(0.25, 0.25, 0.3)
    assert clock.patience.now == pytest.approx(0.8)
    assert clock.patience.resumed == 0.0


def test_a_tick_that_took_five_minutes_counts_as_half_a_second() -> None:
    clock = Clock()
    clock.passes(0.25, 300.0, 0.25)
    assert clock.patience.now == pytest.approx(1.0)
    assert clock.patience.resumed == pytest.approx(0.75)


def test_a_tick_that_is_a_second_late_is_no_pause() -> None:
    clock = Clock()
    clock.passes(1.25)
    assert (clock.patience.now, clock.patience.resumed) == (0.5, 0.0)


def test_a_call_is_made_once_after_as_many_seconds_as_were_seen() -> None:
    clock, made = Clock(), []
    clock.patience.call_later(1.0, made.append, "a")
    clock.passes(0.25, 3600.0)  # 0.75 seen
    assert made == []
    clock.passes(0.25, 0.25)
    assert made == ["a"]


def test_calls_come_in_the_order_in_which_they_are_due() -> None:
    clock, made = Clock(), []
    for seconds, name in ((0.4, "late"), (0.1, "early"), (0.1, "early too")):
        clock.patience.call_later(seconds, made.append, name)
    clock.passes(0.5)
    assert made == ["early", "early too", "late"]


def test_a_call_that_was_cancelled_is_not_made() -> None:
    clock, made = Clock(), []
    clock.patience.call_later(0.1, made.append, "a").cancel()
    clock.passes(0.5)
    assert made == []


def test_a_call_may_ask_for_another() -> None:
    clock, made = Clock(), []
    clock.patience.call_later(0.1, lambda: clock.patience.call_later(0.2, made.append, "second"))
    clock.passes(0.25)
    assert made == []
    clock.passes(0.25)
    assert made == ["second"]
