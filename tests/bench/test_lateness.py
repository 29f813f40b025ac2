"""How late a load was sent, and when that makes its figures doubtful."""

from dataclasses import replace

from taichi_serve.bench.client import Answer
from taichi_serve.bench.lateness import BOUND, Lateness
from taichi_serve.bench.score import Live, Run, Score
from taichi_serve.slo import SLO


def test_the_lateness_is_that_of_the_99th_of_a_hundred() -> None:
    assert Lateness.of([n / 1000 for n in range(100)], (0.5,)) == Lateness(0.098, (0.5,))
    assert Lateness.of([0.25], ()) == Lateness(0.25, ())
    assert Lateness.of([], (0.5,)) is None


def test_of_several_runs_the_latest_counts_and_each_sender_at_its_busiest() -> None:
    parts = [Lateness(0.01, (0.2, 0.6)), Lateness(0.03, (0.4, 0.5)), Lateness(0.02, (0.1,))]
    assert Lateness.worst(parts) == Lateness(0.03, (0.4, 0.6))
    assert Lateness.worst([*parts, None]) is None  # of a file of before


def test_words_are_for_one_sender_and_for_several() -> None:
    assert Lateness(0.0021, (0.31,)).words == "1 sender at 31% of a core, 2.1 ms late (p99)"
    assert Lateness(0.0621, (0.31, 0.28)).words == "2 senders at 28% to 31% of a core, 62.1 ms late (p99)"


def run(lateness: float) -> Run:
    score = Score(SLO(1.0, 1.0), 1, 1.0)
    score.begin((0, 0), Live(10.0, 3, 1), 10.0 + lateness)
    score.end((0, 0), Answer(10.0, times=[10.5], counts=[1], output_tokens=1, finish="length"))
    score.used((0.7, 0.1))
    return score.run(1.0, 1.0)


def test_a_run_whose_load_was_late_is_marked() -> None:
    assert run(BOUND / 2).remarks == ()
    late = run(0.125)
    assert late.lateness == Lateness(0.125, (0.7, 0.1))
    assert late.remarks == ("the load generator was 0.12 s late (p99)",)
    assert Run.of([late, run(0.25)], 1.0).remarks == ("the load generator was 0.25 s late (p99)",)
    assert replace(late, lateness=None).remarks == ()
