"""How many of the last requests kept their SLOs: by window, by SLO, and what does not count."""

from __future__ import annotations

import pytest

from taichi_serve.dashboard.attainment import POINTS, Attainment, Sums
from taichi_serve.messages import Arrived, Finished, Outcome, Prefilled
from taichi_serve.scheduling.headroom import NOBODY
from taichi_serve.slo import SLO

PROMISED = SLO(ttft=1.0, tpot=0.1)


def attainment() -> Attainment:
    return Attainment(lambda: PROMISED)


def one(seen: Attainment, name: str, arrived: float, first: float, ended: float, tokens: int) -> None:
    """A request from its arrival to its last token."""
    seen.on(Arrived(arrived, name, 100, 50))
    seen.on(Prefilled(first, name, 0, "i0"))
    seen.on(Finished(ended, name, tokens))


def test_a_request_counts_for_each_slo_that_it_kept() -> None:
    seen = attainment()
    one(seen, "good", 10.0, 10.5, 11.5, 21)  # TTFT 0.5 s, TPOT 50 ms
    one(seen, "late", 10.0, 12.0, 13.0, 21)  # TTFT 2 s, TPOT 50 ms
    one(seen, "slow", 10.0, 10.5, 14.5, 21)  # TTFT 0.5 s, TPOT 200 ms
    assert seen.window(15.0, 60) == Sums(requests=3, good=1, ttft=2, tpot=2, paced=3)
    assert seen.window(15.0, 60).share("ttft") == 2 / 3
    assert [(p.ttft, round(p.tpot, 3), p.good) for p in seen.points] == [
        (0.5, 0.05, True),
        (2.0, 0.05, False),
        (0.5, 0.2, False),
    ]


def test_what_is_older_than_the_window_is_not_in_it() -> None:
    seen = attainment()
    one(seen, "a", 0.0, 0.1, 5.0, 100)
    one(seen, "b", 100.0, 100.1, 105.0, 100)
    assert seen.window(106.0, 60).requests == 1
    assert seen.window(106.0, 600).requests == 2
    assert seen.window(700.0, 600).requests == 1
    assert seen.window(1000.0, 600) == Sums()


def test_of_no_request_there_is_no_share() -> None:
    assert attainment().window(10.0, 60).share("good") is None


def test_a_failed_request_kept_its_ttft_at_most() -> None:
    seen = attainment()
    seen.on(Arrived(0.0, "begun", 100, 50))
    seen.on(Prefilled(0.1, "begun", 0, "i0"))
    seen.on(Finished(1.0, "begun", 2, Outcome.FAILED))
    seen.on(Arrived(0.0, "not begun", 100, 50))
    seen.on(Finished(0.5, "not begun", 0, Outcome.FAILED))
    assert seen.window(1.0, 60) == Sums(requests=2, ttft=1, paced=2)
    assert not seen.points


def test_a_client_that_left_counts_only_where_its_first_token_was_late() -> None:
    seen = attainment()
    for name, first, ended in (("early", None, 0.9), ("served", 0.5, 5.0), ("tired", None, 1.5)):
        seen.on(Arrived(0.0, name, 100, 50))
        if first is not None:
            seen.on(Prefilled(first, name, 0, "i0"))
        seen.on(Finished(ended, name, 3, Outcome.CANCELLED))
    sums = seen.window(5.0, 60)
    assert sums == Sums(requests=1)
    assert (sums.share("good"), sums.share("ttft"), sums.share("tpot")) == (0.0, 0.0, None)


def test_a_prompt_that_is_computed_again_keeps_the_time_of_its_first_token() -> None:
    seen = attainment()
    seen.on(Arrived(0.0, "a", 100, 50))
    seen.on(Prefilled(0.5, "a", 0, "i0"))
    seen.on(Prefilled(3.0, "a", 1, "i1"))
    seen.on(Finished(3.5, "a", 2))
    assert seen.points[0].ttft == 0.5


def test_the_history_has_ten_seconds_an_entry_and_ends_now() -> None:
    seen = attainment()
    one(seen, "a", 100.0, 100.1, 101.0, 20)
    one(seen, "b", 115.0, 117.0, 117.5, 20)  # late
    one(seen, "c", 116.0, 116.1, 118.0, 40)
    history = seen.history(119.0)
    assert len(history) == 60
    assert history[-1] == (2, 1)
    assert history[-2] == (1, 1)
    assert set(history[:-2]) == {(0, 0)}


def test_memory_is_bounded() -> None:
    seen = attainment()
    for number in range(POINTS + 500):
        one(seen, f"r{number}", number, number + 0.1, number + 0.2, 2)
    assert len(seen.points) == POINTS
    assert seen.ended == POINTS + 500
    assert seen.window(POINTS + 500, 600).requests <= 600


def test_facts_of_unknown_requests_are_not_counted() -> None:
    seen = attainment()
    seen.on(Prefilled(0.5, "a", 0, "i0"))
    seen.on(Finished(3.5, "a", 2))
    assert seen.window(4.0, 60).requests == 0


def test_a_request_with_its_own_slo_is_judged_by_that() -> None:
    seen = Attainment(lambda: SLO(1.0, 0.1))
    for name, slo in (("own", SLO(10.0, 1.0)), ("usual", None)):
        seen.on(Arrived(0.0, name, 100, 500, slo=slo))
        seen.on(Prefilled(5.0, name, 0, "i0"))
        seen.on(Finished(7.0, name, 11))  # 10 tokens in 2 s
    sums = seen.window(8.0, 60)
    assert (sums.requests, sums.good, sums.ttft, sums.tpot) == (2, 1, 1, 1)


def test_measured_headroom_is_what_nine_in_ten_left_of_their_slo() -> None:
    seen = attainment()
    for number in range(10):  # TTFT 0.1 to 1 s of 1 s, TPOT 10 to 100 ms of 100 ms
        first = 10.0 + 0.1 * (number + 1)
        one(seen, f"r{number}", 10.0, first, first + 0.1 * (number + 1), 11)
    found = seen.headroom(13.0, 60)
    assert found.ttft == pytest.approx(0.1)  # nine in ten took 0.9 s at most
    assert found.tpot == pytest.approx(0.1)
    assert seen.headroom(100.0, 60) == NOBODY


def test_each_request_leaves_headroom_of_its_own_slo() -> None:
    seen = attainment()
    seen.on(Arrived(10.0, "loose", 100, 50, slo=SLO(10.0, 1.0)))
    seen.on(Prefilled(15.0, "loose", 0, "i0"))
    seen.on(Finished(17.0, "loose", 11))
    found = seen.headroom(18.0, 60)
    assert found.ttft == pytest.approx(0.5)
    assert found.tpot == pytest.approx(0.8)


def test_a_request_that_came_to_no_end_says_nothing_of_headroom() -> None:
    seen = attainment()
    seen.on(Arrived(0.0, "left", 100, 50))
    seen.on(Finished(0.5, "left", 0, Outcome.CANCELLED))
    assert seen.headroom(1.0, 60) == NOBODY
