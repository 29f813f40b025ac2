"""How long a run is and how many seeds there are: from dispersions that are known by hand."""

import json
import math
import random
from dataclasses import replace

import pytest

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.lengths import LogNormal, Synthetic
from taichi_serve.bench.sharing import Seen
from taichi_serve.bench.workload import Workload, workload
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.shipped import Machine
from taichi_serve.search.effort import RUN_ERROR, Effort, dispersion, pilot, plan, planned, work
from taichi_serve.search.goodput import Scene
from taichi_serve.slo import SLO

TINY = Machine(
    "tiny", "tiny", "none", StepCurve(((0, 0.01), (1000, 0.11)), 0.0, 0.0, 0.0), 64_000, 1000, 8192
)


def scene(sigma, cv=1.0):
    lengths = Synthetic(LogNormal(1000, sigma, 8000), LogNormal(20, 0.0, 20))
    return Scene(TINY, Workload("lengths", lengths, Arrivals("gamma", cv)), SLO(1.0, 0.05))


def test_equal_requests_at_equal_gaps_have_no_dispersion():
    assert dispersion([(float(at), 100.0) for at in range(1, 41)], 10) == 0.0


def test_work_of_1_and_3_a_second_has_a_dispersion_of_a_third():
    # Four batches of one request a second, work 1, 3, 1, 3: the variance is 4/3, the mean 2.
    assert dispersion([(1.0, 1.0), (2.0, 3.0), (3.0, 1.0), (4.0, 3.0)], 1) == pytest.approx(1 / 3)


def test_work_that_comes_later_because_it_is_more_is_no_dispersion():
    # Three seconds of work after 3 s, one after 1 s: the same work a second throughout.
    assert dispersion([(1.0, 1.0), (4.0, 3.0), (5.0, 1.0), (8.0, 3.0)], 1) == pytest.approx(0.0)


def test_poisson_arrivals_of_equal_requests_have_a_dispersion_of_one():
    assert dispersion(pilot(scene(0.0), 5)) == pytest.approx(1.0, rel=0.25)


def test_bursts_that_last_for_many_requests_count_with_the_whole_of_them():
    # A hundred requests a second apart, or a hundred at once: gaps alone have a coefficient of 1.
    chance, at, arriving = random.Random(1), 0.0, []
    for _ in range(200):
        gap = 1.0 if chance.random() < 0.5 else 0.0
        for _ in range(100):
            at += gap
            arriving.append((at, 10.0))
    assert dispersion(arriving, 200) > 20 * dispersion(arriving, 1)


def test_fewer_than_two_batches_say_nothing():
    with pytest.raises(ValueError, match="at least two batches of 250"):
        dispersion([(1.0, 10.0)] * 499)


def test_what_a_cache_can_have_of_a_prompt_is_no_work():
    seconds = work(scene(0.0))
    turn = Call(0.0, 1000, 20)
    cheaper = seconds(Seen(turn, 0)) - seconds(Seen(turn, 800))
    assert cheaper == pytest.approx(800 * (0.01 / 4096 + 0.0001))


def test_later_turns_of_conversations_are_work_when_they_come():
    one = replace(scene(0.0), workload=workload("conversations:turns=5", 8000))
    times = [at for at, _ in pilot(one, 0)]
    assert times == sorted(times)
    assert len(times) > 2 * len(list(one.workload.calls(1.0, len(times), 0)))
    assert plan(one, 1.0, Effort(), 0).dispersion > 1


def test_a_trace_in_its_order_has_no_more_to_say_than_its_rows(tmp_path):
    made = planned(2.0, 1.0, Effort(), 0, rows=5000)
    assert len(made.judging) * made.requests == 20_000
    assert made.error == pytest.approx(0.02)
    assert made.cut
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": n * 1000, "input_length": 100, "output_length": 5, "hash_ids": [n]} for n in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = replace(scene(0.0), workload=workload(str(path), 8000))
    assert plan(one, 1.0, Effort(), 0).rows == 9
    assert plan(scene(0.0), 1.0, Effort(), 0).rows is None


def test_a_prompt_costs_its_share_of_a_full_step_and_a_decode_its_share_of_the_fullest_that_keeps_tpot():
    # 4096 tokens take 10 ms and 0.1 ms each: 0.10244 ms a token. KV holds 63 decodes of 1010 tokens, and
    # a step of these takes 16.3 ms, within 50: 0.258 ms a decode.
    beside = 64_000 / 1010
    expected = 1000 * (0.01 / 4096 + 0.0001) + 19 * (0.01 / beside + 0.0001)
    assert work(scene(0.0))(Seen(Call(0.0, 1000, 20), 0)) == pytest.approx(expected, rel=1e-6)


def test_seeds_times_requests_are_what_the_error_asks_for():
    # Dispersion 2: 1 % needs 20,000 requests, 25 runs of 800.
    made = planned(2.0, 1.0, Effort(seconds=120, least=800), 0)
    assert (made.requests, len(made.judging)) == (800, 25)
    assert made.error == pytest.approx(0.01)
    assert made.run_error == pytest.approx(RUN_ERROR)
    assert not made.cut


def test_more_traffic_makes_longer_runs_and_fewer_seeds_but_never_fewer_than_five():
    made = planned(2.0, 30.0, Effort(seconds=120), 0)
    assert (made.requests, len(made.judging)) == (3600, 6)
    assert len(planned(0.5, 30.0, Effort(seconds=120), 0).judging) == 5


def test_where_the_limit_cuts_the_plan_says_so():
    # 200,000 requests are asked for, 60,000 allowed: sqrt(20 / 60,000) = 1.8 %. Runs of 8,000, 4,000 allowed.
    made = planned(20.0, 1.0, Effort(most=4000), 0)
    assert made.requests * len(made.judging) == 60_000
    assert made.error == pytest.approx(0.01826, rel=1e-3)
    assert made.cut
    assert not planned(20.0, 1.0, Effort(most=8000, judging=200_000), 0).cut
    assert planned(20.0, 1.0, Effort(most=4000, judging=200_000), 0).cut  # each run is still too short


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e6])
def test_no_seed_that_judges_tunes_nor_belongs_to_another_search(seed, spread):
    effort = Effort(least=10, most=50, judging=10**9)
    made, other = planned(spread, 0.1, effort, seed), planned(spread, 0.1, effort, seed + 1)
    assert 3 <= len(made.tuning) <= 8
    assert len(made.judging) >= 5
    seeds = [*made.tuning, *made.judging, *other.tuning, *other.judging]
    assert len(set(seeds)) == len(seeds)


def test_nobody_is_judged_where_that_is_not_asked_for():
    made = planned(2.0, 1.0, Effort(judging=0), 0)
    assert made.judging == ()
    assert math.isnan(made.error)
    assert not made.cut


def test_a_heavy_tailed_workload_gets_longer_runs_and_more_requests():
    effort = Effort(most=10**6, judging=10**9)
    even, heavy = (plan(scene(sigma), 1.0, effort, 0) for sigma in (0.0, 2.0))
    assert heavy.dispersion > 2 * even.dispersion
    assert heavy.requests > even.requests
    assert heavy.requests * len(heavy.judging) > 2 * even.requests * len(even.judging)


def test_the_same_workload_gets_the_same_plan():
    assert plan(scene(1.0), 1.0, Effort(), 3) == plan(scene(1.0), 1.0, Effort(), 3)


@pytest.mark.parametrize(("sigma", "cv"), [(0.0, 1.0), (1.0, 1.0), (0.5, 3.0)])
def test_the_work_of_runs_scatters_as_the_plan_says(sigma, cv):
    one = scene(sigma, cv)
    made, seconds = plan(one, 1.0, Effort(least=500, most=500), 0), work(one)
    loads = []
    for seed in range(60):
        calls = list(one.workload.calls(1.0, made.requests, seed))
        loads.append(sum(seconds(Seen(call, 0)) for call in calls) / calls[-1].at)
    mean = sum(loads) / len(loads)
    error = math.sqrt(sum((load - mean) ** 2 for load in loads) / (len(loads) - 1)) / mean
    assert error == pytest.approx(made.run_error, rel=0.35)
