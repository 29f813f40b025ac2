"""The harness that holds simulated engines to recorded ones, tried on recordings whose truth is known."""

import io
import random
from pathlib import Path

import pytest

from taichi_serve.bench.recording import Jittered, Nearest, Recording
from taichi_serve.bench.replay import RecordedSteps, again, moved
from taichi_serve.cluster.base import run
from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster
from taichi_serve.eventlog import LogError, Logged, read
from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.fit import Sample
from taichi_serve.latency.model import Batch, Roofline
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Flow, Flowed, Move, Refused, Stepped
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

CURVE = StepCurve(((0, 0.01), (1000, 0.11)), 1e-8, 1e-7, 1e-5)
SHAPE = EngineShape(16_000)


def recording(sliders, seed=1, latency=0.0):
    chance = random.Random(seed)
    at, calls = 0.0, []
    for _ in range(150):
        at += chance.expovariate(15.0)
        calls.append(Call(at, chance.randint(1, 900), chance.randint(1, 60)))
    cluster = SimulatedCluster(sliders, [CURVE], SHAPE, Link(0.0, 1.0, latency), calls, (), 16_000)
    out = io.StringIO()
    inner = GlobalScheduler(sliders, SLO(1.0, 0.05), Learned(), Policy(), cluster.capacities)
    run(Logged(inner, out), cluster)
    return list(read(out.getvalue().splitlines(keepends=True)))


def test_recorded_durations_give_the_recorded_times_back():
    sliders = Sliders(0, 2, 0, 256)
    real, simulated = again(recording(sliders), sliders, SHAPE)
    assert simulated.errors(real) == pytest.approx({"tpot_mean": 0, "ttft_p50": 0, "ttft_p90": 0}, abs=1e-9)
    assert real.requests == 150


def test_with_moves_the_agreement_is_within_the_limits_set_for_real_recordings():
    sliders = Sliders(1, 1, 512, 64)
    real, simulated = again(recording(sliders, latency=0.02), sliders, SHAPE)
    errors = simulated.errors(real)
    assert abs(errors["tpot_mean"]) <= 0.03
    assert abs(errors["ttft_p50"]) <= 0.05
    assert abs(errors["ttft_p90"]) <= 0.10


def test_a_model_that_is_a_tenth_too_slow_shows():
    sliders = Sliders(0, 2, 0, 256)
    real, simulated = again(recording(sliders), sliders, SHAPE, CURVE.scaled(1.1))
    assert 0.1 < simulated.errors(real)["tpot_mean"] < 0.25  # queues make more than a tenth of a tenth


def test_steps_with_prompts_keep_their_durations_apart_from_steps_without():
    steps = [Stepped(0, "i0", s, p, 1, 0) for s, p in ((0.1, 50), (0.01, 0), (0.2, 50), (0.02, 0))]
    truth = RecordedSteps(steps)
    assert [truth.of(p, 0, 1, 0) for p in (0, 50, 0, 50, 50)] == pytest.approx([0.01, 0.1, 0.02, 0.2, 0.15])


def test_a_log_in_which_nothing_was_finished_is_refused():
    with pytest.raises(ValueError, match="no request"):
        again([], Sliders(0, 1, 0, 64), SHAPE)


RECORDINGS = Path(__file__).parent / "recordings"
REQUESTS = {"hybrid": 200, "aggregation": 200, "busy": 400}


@pytest.mark.parametrize(("name", "requests"), REQUESTS.items())
def test_engines_in_miniature_agree_with_recorded_real_ones(name, requests):
    real, simulated = Recording.load(RECORDINGS / f"{name}.jsonl.gz").again()
    errors = simulated.errors(real)
    assert real.requests == simulated.requests == requests
    assert abs(errors["tpot_mean"]) <= 0.03
    assert abs(errors["ttft_p50"]) <= 0.05
    assert abs(errors["ttft_p90"]) <= 0.10


@pytest.mark.parametrize("name", ["h200-aggregation", "h200-hybrid", "h200-auto"])
def test_engines_in_miniature_agree_with_four_gpus_within_a_little_more(name):
    real, simulated = Recording.load(RECORDINGS / f"{name}.jsonl.gz").again()
    errors = simulated.errors(real)
    assert real.requests >= 628  # of 630
    assert abs(errors["tpot_mean"]) <= 0.045
    assert abs(errors["ttft_p50"]) <= 0.06
    assert abs(errors["ttft_p90"]) <= 0.07


def test_in_one_recording_decodes_were_degraded_and_flowed_back_and_most_of_them_do_so_again():
    recording = Recording.load(RECORDINGS / "flowing.jsonl.gz")
    assert (recording.moves[Move.DEGRADE], recording.moves[Move.BACKFLOW]) == (9, 23)
    assert recording.moves[Move.OPERATOR] == recording.moves[Move.DRAIN] == 0
    real, simulated = recording.again()
    assert real.moves == recording.moves.total()
    assert simulated.moves == pytest.approx(real.moves, rel=0.1)


def test_moves_are_counted_by_why_and_only_where_they_landed():
    entries = [
        (Stepped(1.0, "i1", 0.1, 0, 2, 0), [Flow(name, 1, "i0", Move.DEGRADE) for name in "ab"]),
        (Flowed(1.2, "a", 1, "i0", 9, 100, 0.2), []),
        (Refused(1.3, "b", 1, "no room"), []),
        (Stepped(2.0, "i0", 0.1, 0, 1, 0), [Flow("a", 2, "i1", Move.BACKFLOW)]),
        (Flowed(2.2, "a", 2, "i1", 15, 100, 0.2), []),
    ]
    assert moved(entries) == {Move.DEGRADE: 1, Move.BACKFLOW: 1}


def test_a_recording_whose_file_is_torn_is_one_error_that_names_it(tmp_path):
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes((RECORDINGS / "hybrid.jsonl.gz").read_bytes()[:5000])
    with pytest.raises(LogError, match=r"torn\.jsonl\.gz"):
        Recording.load(torn)


def test_jitter_gives_every_step_the_ratio_of_a_recorded_one():
    model = Roofline(launch=0.01)
    samples = [Sample(Batch(decodes=1), 0.01), Sample(Batch(decodes=1), 0.03)]
    truth = Jittered(model, samples)
    assert [truth.of(0, 0, 5, 0) for _ in range(3)] == pytest.approx([0.03, 0.01, 0.03])


def test_the_nearest_recorded_steps_take_turns():
    samples = [Sample(Batch(decodes=d), d / 1000) for d in (*range(1, 9), *range(1000, 1009))]
    truth = Nearest(samples)
    assert sorted(truth.of(0, 0, 2, 0) for _ in range(8)) == [d / 1000 for d in range(1, 9)]
