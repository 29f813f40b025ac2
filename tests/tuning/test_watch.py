"""What became of the last requests, as shares of their SLOs."""

from __future__ import annotations

from taichi_serve.messages import Arrived, Finished, Outcome, Prefilled
from taichi_serve.slo import SLO
from taichi_serve.tuning.watch import View, Watch, percentile

PROMISED = SLO(ttft=1.0, tpot=0.1)


def seen(
    watch: Watch, name: str, at: float, first: float | None, end: float | None, output: int = 11
) -> None:
    watch.on(Arrived(at, name, 100, 500))
    if first is not None:
        watch.on(Prefilled(first, name, 0, "i0"))
    if end is not None:
        watch.on(Finished(end, name, output))


def view(watch: Watch, now: float, since: float = 0.0, out: int = 0) -> View:
    return watch.view(now, PROMISED, since, lambda _: out)


def test_a_request_that_ended_has_used_shares_of_both_slos() -> None:
    watch = Watch()
    seen(watch, "a", at=0.0, first=0.5, end=1.7)  # 10 tokens in 1.2 s
    found = view(watch, now=2.0)
    assert (found.ttft, found.judged, found.good) == (0.5, 1, 0.0)
    assert round(found.tpot, 9) == 1.2
    assert (found.late, found.slow) == (0.0, 1.0)


def test_a_request_with_its_own_slo_has_used_a_share_of_that() -> None:
    watch = Watch()
    watch.on(Arrived(0.0, "a", 100, 500, slo=SLO(10.0, 0.4)))
    watch.on(Prefilled(5.0, "a", 0, "i0"))
    watch.on(Finished(7.0, "a", 11))  # 10 tokens in 2 s
    found = view(watch, now=8.0)
    assert (found.ttft, found.tpot, found.good) == (0.5, 0.5, 1.0)


def test_one_that_waits_counts_as_late_only_when_it_is() -> None:
    watch = Watch()
    seen(watch, "a", at=0.0, first=None, end=None)
    assert view(watch, now=0.9).ttfts == 0
    late = view(watch, now=1.5)
    assert (late.ttfts, late.ttft, late.late, late.judged, late.good) == (1, 1.5, 1.0, 1, 0.0)


def test_an_answer_under_way_has_a_running_tpot_once_it_has_some_tokens() -> None:
    watch = Watch()
    seen(watch, "a", at=0.0, first=0.5, end=None)
    assert view(watch, now=2.5, out=15).tpots == 0
    assert round(view(watch, now=2.5, out=21).tpot, 9) == 1.0  # 20 tokens in 2 s


def test_who_arrived_before_the_window_is_not_in_it() -> None:
    watch = Watch()
    seen(watch, "old", at=0.0, first=5.0, end=6.0)
    seen(watch, "new", at=10.0, first=10.2, end=10.7)
    assert view(watch, now=11.0, since=10.0).late == 0.0
    assert view(watch, now=11.0, since=0.0).late == 0.5


def test_a_client_that_left_says_nothing_about_sliders() -> None:
    watch = Watch()
    watch.on(Arrived(0.0, "a", 100, 500))
    watch.on(Finished(3.0, "a", 0, Outcome.CANCELLED))
    assert view(watch, now=4.0).judged == 0


def test_a_percentile_is_the_value_that_so_many_are_at_or_below() -> None:
    assert percentile([float(n) for n in range(1, 11)], 0.9) == 9.0
    assert percentile([3.0], 0.9) == 3.0
    assert percentile([], 0.9) == 0.0


def test_one_that_was_turned_away_is_bad_from_the_moment_it_came() -> None:
    watch = Watch()
    watch.on(Arrived(0.0, "a", 100, 50))
    watch.on(Finished(0.0, "a", 0, Outcome.REFUSED))
    view = watch.view(0.1, SLO(4.0, 0.1), 0.0, lambda _: 0)
    assert (view.judged, view.late, view.good) == (1, 1.0, 0.0)
