"""The search over rates on a fake measurement, and a trial that makes no sense."""

from dataclasses import replace

import pytest

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.bracket import Bracket
from taichi_serve.bench.score import Run
from taichi_serve.bench.trial import Trial, climb, measure
from taichi_serve.slo import SLO

PROMISE = SLO(4.0, 0.07)


class Fake:
    """A server with a cliff: below it 95 of 100 are good, above it 50 are. Ends early where it may."""

    def __init__(self, cliff, wholly=False):
        self.cliff, self.wholly = cliff, wholly
        self.asked = []

    async def run(self, rate, early):
        self.asked.append((rate, early))
        kept = rate <= self.cliff
        good, bad = (95, 5) if kept else (50, 50)
        if early and not self.wholly:
            good, bad = (90, 0) if kept else (0, 11)
        return Run(rate, 100, good + bad, good, bad, kept, 1.0, 0.0, ())


async def test_the_rate_found_is_seen_to_its_end():
    fake = Fake(cliff=3.0)
    found = await climb(Bracket(1.0, tolerance=0.5), fake.run)
    assert fake.asked == [(1.0, True), (2.0, True), (4.0, True), (8**0.5, True), (8**0.5, False)]
    assert found.rate == pytest.approx(8**0.5)
    assert (found.there.good, found.there.total) == (95, 100)
    assert len(found.runs) == 5


async def test_a_rate_that_was_seen_to_its_end_is_not_run_again():
    fake = Fake(cliff=3.0, wholly=True)
    found = await climb(Bracket(1.0, tolerance=0.5), fake.run)
    assert len(fake.asked) == 4
    assert found.there.rate == found.rate


async def test_a_rate_that_misses_when_it_is_seen_to_its_end_is_not_the_goodput():
    fake = Fake(cliff=3.0)

    async def run(rate, early):
        made = await fake.run(rate, early)
        unlucky = rate > 2.0 and not early  # 2.83 keeps its target only as long as it may end early
        return replace(made, good=80, bad=20, kept=False) if unlucky else made

    found = await climb(Bracket(1.0, tolerance=0.5), run)
    assert [(round(rate, 2), early) for rate, early in fake.asked[3:]] == [
        (2.83, True),
        (2.83, False),
        (2.0, False),  # 2.83 is missed now, and 2 within 50 % of it
    ]
    assert (found.rate, found.there.good) == (2.0, 95)


async def test_where_no_rate_is_kept_the_goodput_is_zero():
    found = await climb(Bracket(1.0), Fake(cliff=0.0).run)
    assert (found.rate, found.there) == (0.0, None)


async def test_a_rate_that_was_never_missed_is_a_lower_bound_and_no_goodput():
    found = await climb(Bracket(4.0), Fake(cliff=1000.0, wholly=True).run)
    assert (found.rate, found.at_least, found.words) == (256.0, True, "at least 256")
    found = await climb(Bracket(1.0, tolerance=0.5), Fake(cliff=3.0).run)
    assert (found.at_least, found.words) == (False, "2.83")
    found = await climb(Bracket(1.0), Fake(cliff=0.0).run)
    assert (found.at_least, found.words) == (False, "below 0.0156")


class Loop:
    """A load whose requests all fail at once, on a server that has these instances before and after."""

    def __init__(self, *instances):
        self.said = iter(instances)

    async def instances(self):
        return next(self.said)

    async def run(self, plan, score, early, tell):
        pass


async def measured(*instances, seeds=(0,), warm_up=2):
    trial = Trial("sharegpt", PROMISE, requests=10, warm_up=warm_up, seeds=seeds)
    return trial, await measure(Loop(*instances), trial, trial.lengths(4096), 2.0, False, lambda score: None)


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ({"i0": 11, "i1": 12}, {"i0": 11, "i1": 12}, ()),
        ({"i0": 11, "i1": 12}, {"i0": 11, "i1": None}, ("i1",)),
        ({"i0": 11, "i1": 12}, {"i0": 31, "i1": 12}, ("i0",)),  # it died and came back
        ({"i0": 11, "i1": None}, {"i0": 11, "i1": 12}, ("i1",)),
        ({}, {}, ()),  # a server that is not ours
        ({"i0": 11}, {}, ()),  # it did not answer: whether it is there at all others find out
    ],
)
async def test_a_run_says_which_instances_were_not_there_all_the_time(before, after, lost):
    _, run = await measured(before, after)
    assert run.lost == lost


async def test_the_span_of_a_run_is_that_of_counted_requests_of_its_shortest_seed():
    trial, run = await measured({}, {}, seeds=(0, 1))
    calls = [list(trial.lengths(4096).calls(2.0, 12, seed)) for seed in (0, 1)]
    assert run.span == pytest.approx(min(c[11].at - c[2].at for c in calls))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"attainment": 0.0}, "attainment must be above 0 and at most 1, not 0.0"),
        ({"attainment": 1.01}, "attainment must be above 0 and at most 1, not 1.01"),
        ({"requests": 0}, "requests must be at least 1, not 0"),
        ({"warm_up": -1}, "warm-up must be at least 0, not -1"),
        ({"seeds": (1, 1)}, "seeds must be different numbers"),
        ({"start": 0.0}, "start must be a positive number"),
        ({"tolerance": -0.1}, "tolerance must be a positive number"),
    ],
)
def test_a_trial_that_makes_no_sense_is_refused(wrong, line):
    with pytest.raises(ValueError, match=line):
        Trial("sharegpt", PROMISE, **wrong)


def test_scale_shortens_prompts_and_outputs_alike():
    prompt, output = Trial("sharegpt", PROMISE, scale=0.1).lengths(4096).means()
    assert prompt == pytest.approx(66.1, rel=0.05)
    assert output == pytest.approx(25.7, rel=0.05)


def test_scale_shortens_a_trace_before_it_is_held_against_the_models_limit(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n8000,200\n3,100\n")
    trace = Trial(str(path), PROMISE, scale=0.1).lengths(1000).source.trace
    assert (list(trace.prompts), list(trace.outputs)) == ([800, 1], [20, 10])
    with pytest.raises(ValueError, match="row 2: num_prefill_tokens: 800 \\+ 20 tokens are over"):
        Trial(str(path), PROMISE, scale=0.1).lengths(819)


def test_arrivals_are_those_that_were_asked_for():
    calls = Trial("sharegpt", PROMISE, arrivals=Arrivals("gamma", 0.0)).lengths(4096).calls(2.0, 3, 0)
    assert [call.at for call in calls] == [0.5, 1.0, 1.5]
    with pytest.raises(ValueError, match="'sharegpt' has no arrival times of its own: take poisson or gamma"):
        Trial("sharegpt", PROMISE, arrivals=Arrivals("trace")).lengths(4096)


async def test_a_run_of_conversations_sends_as_many_requests_as_were_asked_for():
    class Counting(Loop):
        async def run(self, plan, score, early, tell):
            assert (plan.total, plan.warm_up, plan.block_size) == (12, 2, 16)
            assert any(call.then for call in plan.calls)

    trial = Trial("conversations:think=0", PROMISE, requests=10, warm_up=2)
    run = await measure(Counting({}, {}), trial, trial.lengths(4096), 2.0, False, lambda score: None)
    assert run.span > 0
