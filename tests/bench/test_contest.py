"""Who is visited next, and what is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from contests import TRIAL, play, run

from taichi_serve.bench.contest import Contest, Round, Visit, order
from taichi_serve.bench.score import Others


def asked(contest: Contest) -> list[tuple[int, int, str]]:
    return [(r.rung, r.seed, "".join(sorted(v.name for v in r.visits))) for r in contest.rounds]


def test_two_of_them_go_there_and_back_and_three_take_turns_to_be_first() -> None:
    assert ["".join(order("AB", turn)) for turn in range(4)] == ["AB", "BA", "BA", "AB"]
    assert ["".join(order("ABC", turn)) for turn in range(6)] == ["ABC", "CBA", "BCA", "ACB", "CAB", "BAC"]


def test_everybody_is_visited_at_the_first_rate_with_one_seed_and_then_with_the_next() -> None:
    contest = Contest(("A", "B"), TRIAL)
    first = contest.next()
    assert first is not None
    assert (first.rung, first.rate, first.seed, first.early, first.names) == (0, 1.0, 0, True, ("A", "B"))
    assert first.others == (Others(100), Others(100))
    visits = tuple(
        Visit(name, run(first, others, True)) for name, others in zip("AB", first.others, strict=True)
    )
    contest.add(Round(0, 0, visits))
    second = contest.next()
    assert second is not None
    assert (second.rung, second.seed, second.names) == (0, 1, ("B", "A"))
    assert second.others == (Others(100, good=95), Others(100, good=95))


def test_equal_contenders_are_never_apart_and_are_seen_whole_at_both_rates_that_decide() -> None:
    contest = play({"A": 2.4, "B": 2.4})
    assert {who for _, _, who in asked(contest)} == {"AB"}
    assert contest.climb("A").deciding == contest.climb("B").deciding == (9, 10)
    assert all(
        any(r.whole("A", "B") for r in contest.rounds if (r.rung, r.seed) == (rung, seed))
        for rung in (9, 10)
        for seed in (0, 1)
    )
    found = contest.goodput("A")
    assert found.rate == pytest.approx(1.1**9)
    assert found.there is not None
    assert (found.there.good, found.there.total, found.there.whole, found.at_least) == (190, 200, True, False)


def test_a_contender_that_is_decided_with_its_first_seed_is_not_asked_for_the_second() -> None:
    contest = play({"A": 2.4, "B": 0.5})  # 21 bad ones of 200 are enough, and B has 30 of its first 100
    assert asked(contest)[:3] == [(0, 0, "AB"), (0, 1, "A"), (-7, 0, "B")]
    assert contest.runs("B")[0].sent == 21


def test_near_ones_meet_at_each_others_rates_and_far_ones_do_not() -> None:
    contest = play({"A": 2.4, "B": 2.6, "C": 8.2})  # rungs 9, 10 and 22
    assert [contest.climb(name).low for name in "ABC"] == [9, 10, 22]
    whole = {(r.rung, "".join(sorted(v.name for v in r.visits if v.run.whole))) for r in contest.rounds}
    assert {(9, "AB"), (10, "AB"), (11, "AB"), (22, "C"), (23, "C")} <= whole
    assert not any("C" in who for rung, who in whole if 7 < rung < 14)


def test_a_rate_that_misses_when_it_is_seen_whole_is_missed_and_the_climb_goes_on() -> None:
    contest = Contest(("A",), TRIAL)
    for _ in range(100):
        if (task := contest.next()) is None:
            break
        kept = task.rung <= 8 or (task.rung == 9 and task.early)
        visit = Visit("A", run(task, task.others[0], kept))
        contest.add(Round(task.rung, task.seed, (visit,)))
    assert contest.climb("A").deciding == (8, 9)
    there = contest.goodput("A").there
    assert there is not None
    assert there.whole


def test_who_keeps_no_rate_and_who_misses_none_has_a_bound() -> None:
    contest = play({"A": 0.0, "B": 1e9})
    assert contest.goodput("A").words.startswith("below 0.0")
    assert contest.goodput("B").words.startswith("at least ")


def test_a_contest_that_was_stopped_goes_on_where_it_was() -> None:
    cliffs = {"A": 2.4, "B": 3.1}
    whole = play(cliffs)
    for stopped in range(len(whole.rounds)):
        again = play(cliffs, contest=Contest(("A", "B"), TRIAL, list(whole.rounds[:stopped])))
        assert again.rounds == whole.rounds


def test_with_full_no_visit_may_end_early_and_nothing_is_visited_twice() -> None:
    contest = play({"A": 2.4, "B": 2.4}, replace(TRIAL, full=True))
    assert all(visit.run.whole for done in contest.rounds for visit in done.visits)
    assert len(asked(contest)) == len(set(asked(contest)))


def test_how_far_the_machine_moved_is_of_the_round_and_stands_in_what_is_found() -> None:
    contest = play({"A": 2.4, "B": 2.4})
    assert contest.rounds[0].drift == 0.0
    last = contest.rounds[-1]
    contest.rounds[-1] = replace(last, speeds=(10.0, 10.9, 11.2))
    assert contest.rounds[-1].drift == pytest.approx(0.12)
    missed = contest.runs("B")[last.rung]
    assert missed.drift == pytest.approx(0.12)
    assert missed.remarks == ("the machine's speed moved by 12%",)
