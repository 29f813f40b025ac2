"""When a request is good or lost, when a rate is decided, and what is then known of its attainment."""

from dataclasses import replace

import pytest

from taichi_serve.bench.client import Answer
from taichi_serve.bench.goodput import wilson
from taichi_serve.bench.score import Live, Sample, Score
from taichi_serve.slo import SLO

PROMISE = SLO(ttft=1.0, tpot=0.1)
DUE = 50.0


def answer(ttft=0.5, gap=0.05, tokens=11, finish="length", error=None):
    times = [DUE + ttft + gap * k for k in range(tokens)]
    return Answer(DUE, "id", "", [7] * tokens, times, [1] * tokens, 20, tokens, finish, error)


def live(tokens=11):
    return Live(DUE, 20, tokens)


def sample(*args, **more):
    return Sample.of((0, 1), live(), answer(*args, **more), PROMISE)


def test_a_request_is_good_when_both_times_keep_to_their_slos():
    assert sample().good
    assert sample(ttft=1.0, gap=0.0999).good
    assert not sample(ttft=1.1).good
    assert not sample(gap=0.11).good


def test_ttft_counts_from_when_a_request_was_due_and_not_from_when_the_client_got_round_to_it():
    late = answer(ttft=1.25)
    late.sent_at = DUE + 1.0
    assert Sample.of((0, 1), live(), late, PROMISE).ttft == pytest.approx(1.25)


def test_what_failed_or_was_refused_or_came_short_is_not_good_however_fast_it_was():
    assert sample(error="HTTP 503: full").error == "HTTP 503: full"
    assert sample(finish=None).error == "it ended without a finish reason"
    assert sample(tokens=10).error == "10 tokens came, 11 were asked for"
    assert not any(s.good for s in (sample(error="x"), sample(finish=None), sample(tokens=10)))
    refused = Sample.of((0, 1), live(), Answer(DUE, error="HTTP 429"), PROMISE)
    assert (refused.ttft, refused.good) == (None, False)


def test_the_cached_share_is_of_the_prompts_of_requests_that_ended_properly():
    answers = [answer(), answer(), answer(error="HTTP 503: full")]
    for told, cached in zip(answers, (16, 0, 20), strict=True):
        told.cached_tokens = cached
    score = Score(PROMISE, 4, 0.9)
    for number, told in enumerate([*answers, answer()]):
        score.begin((0, number), live(), DUE)
        score.end((0, number), told)
    assert score.run(1.0, 1.0).cached == pytest.approx(16 / 60)


def test_without_a_word_of_the_server_the_cached_share_is_not_known():
    score = Score(PROMISE, 1, 0.9)
    score.begin((0, 0), live(), DUE)
    score.end((0, 0), answer())
    assert score.run(1.0, 1.0).cached is None


def test_a_request_is_lost_once_its_first_token_is_late():
    waiting = live()
    assert not waiting.lost(DUE + 1.0, PROMISE)
    assert waiting.lost(DUE + 1.01, PROMISE)


def test_a_request_is_lost_once_its_last_token_is_late():
    running = live()
    running.answer = answer(ttft=0.5, tokens=3)  # three of eleven: the last is due ten gaps after the first
    assert not running.lost(DUE + 1.5, PROMISE)
    assert running.lost(DUE + 1.51, PROMISE)
    running.answer = answer(ttft=0.5, tokens=11)  # all out: only its end is awaited
    assert not running.lost(DUE + 9.0, PROMISE)


def scored(good, bad, total=10, attainment=0.9):
    score = Score(PROMISE, total, attainment)
    for number in range(good + bad):
        score.begin((0, number), live(), DUE)
        score.end((0, number), answer() if number < good else answer(ttft=3.0))
    return score


def test_a_rate_is_decided_as_soon_as_nothing_can_change_it():
    assert scored(8, 1).kept is None
    assert scored(9, 0).kept is True
    assert scored(0, 1).kept is None
    assert scored(0, 2).kept is False
    assert scored(10, 0, attainment=1.0).kept is True
    assert scored(0, 1, attainment=1.0).kept is False


def test_who_is_lost_while_under_way_counts_once():
    score = scored(0, 1)
    score.begin((0, 9), live(), DUE + 0.25)
    assert (score.lag, score.open, score.bad) == (0.25, 1, 1)
    score.look(DUE + 2.0)
    assert (score.open, score.bad, score.kept) == (0, 2, False)
    score.end((0, 9), answer(ttft=3.0))
    assert score.bad == 2


def test_aborted_requests_that_were_lost_stay_bad_and_the_others_stay_unknown():
    score = scored(3, 0)
    score.begin((0, 8), live(), DUE)
    score.look(DUE + 2.0)
    score.begin((0, 9), Live(DUE + 2.0, 20, 11), DUE + 2.0)
    score.give_up()
    run = score.run(4.0, 7.0)
    assert (run.sent, run.good, run.bad, run.whole) == (5, 3, 1, False)
    assert (run.least, run.most) == (0.3, 0.9)
    assert run.interval == (wilson(3, 10)[0], wilson(9, 10)[1])


def test_a_run_is_too_short_below_a_minute_or_ten_times_the_mean_request():
    run = scored(10, 0).run(1.0, 1.0)  # each took 0.5 s and ten gaps of 0.05 s
    assert run.mean == pytest.approx(1.0)
    assert run.remarks == ()  # of an older file, where nobody knows
    assert replace(run, span=59.0).remarks == ("too short: 59 s of traffic",)
    assert replace(run, span=60.0).remarks == ()
    slow = Score(SLO(30.0, 1.0), 1, 0.9)
    slow.begin((0, 1), live(), DUE)
    slow.end((0, 1), answer(ttft=2.0, gap=0.5))  # 7 s
    assert replace(slow.run(1.0, 1.0), span=69.0).remarks == (
        "too short: 69 s of traffic for requests of 7 s",
    )
    assert replace(slow.run(1.0, 1.0), span=70.0).remarks == ()


def test_wilson_by_hand():
    # 9 of 10, z 1.96: z^2 = 3.8416; middle (0.9 + 0.19208) / 1.38416 = 0.78898;
    # half 1.96 * sqrt(0.009 + 0.009604) / 1.38416 = 0.19314.
    assert wilson(9, 10) == pytest.approx((0.59585, 0.98212), abs=2e-5)
    assert scored(9, 1).run(1.0, 1.0).interval == wilson(9, 10)


def test_quantiles_are_of_all_that_were_sent():
    score = scored(9, 0)
    score.begin((0, 9), live(), DUE)
    score.end((0, 9), Answer(DUE, error="HTTP 503"))
    run = score.run(1.0, 1.0)
    assert run.quantile("ttft", 0.9) == pytest.approx(0.5)
    assert run.quantile("ttft", 0.99) is None  # the tenth never ended
    assert run.failed == 1
