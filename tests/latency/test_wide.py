"""A prediction for all instances at once is the prediction of each."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taichi_serve.instance import Instance
from taichi_serve.latency.columns import Columns, Wide, margin, row
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.predict import Learned, Predictor
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.latency.wide import wide
from taichi_serve.messages import Flowed, Stepped
from taichi_serve.sliders import Kind

P, D = Kind.P_HEAVY, Kind.D_HEAVY
MODEL = Roofline(launch=0.002, mixed=0.001, token=1e-4, attention=2e-9, decode=5e-5, kv=1.2e-7, knee=192)
COUNT = 12


def profiled() -> Profiled:
    return Profiled(MODEL, {(P, D): Transfer(P, D, 0.005, 2e10), (D, D): Transfer(D, D, 0.01, 1e9)}, 200_000)


def instances(chance: Random) -> list[Instance]:
    """Idle ones, such with a queue, with decodes, with both; some with a full KV cache."""
    made = []
    for number in range(COUNT):
        one = Instance(f"i{number}", chance.choice([P, D]), chance.choice([0, 1, 128, 512, 1024]), 1_000_000)
        if chance.random() < 0.6:
            one.queued_requests = chance.randint(1, 5)
            one.queued_tokens = one.queued_requests * chance.randint(1, 4_000)
            one.queued_attention = one.queued_tokens * chance.randint(1, 4_000)
            one.progress_tokens = chance.randint(0, one.queued_tokens - 1)
            one.running_tokens = min(one.chunk, one.queued_tokens - one.progress_tokens)
        if chance.random() < 0.6:
            one.decodes, one.ticks = chance.randint(1, 300), chance.randint(0, 10_000)
            one.context_base = one.decodes * chance.randint(0, 3_000)
        one.stepped_at = chance.uniform(0.0, 30.0)
        made.append(one)
    return made


def learn(predictor: Predictor, made: list[Instance], chance: Random) -> float:
    """Steps of some instances, the last ones of some long ago; and the time now."""
    now = 0.0
    for _ in range(chance.randint(0, 80)):
        now += chance.choice([0.01, 0.1, 3.0])
        one = chance.choice(made[: chance.randint(1, COUNT)])
        prompt, decodes = chance.choice([0, 0, 1, 100, 1024]), chance.choice([0, 1, 50])
        predictor.stepped(one, Stepped(now, one.name, chance.uniform(0.002, 0.4), prompt, decodes, 1_000))
    for _ in range(chance.randint(0, 3)):
        move = Flowed(now, "r", 1, "i1", 2, chance.choice([0, 500]), chance.uniform(0.0, 0.3))
        predictor.flowed(made[0], made[1], move)
    return now


def table(asked: Wide, made: list[Instance]) -> Columns:
    columns = Columns(len(made))
    columns.put(list(range(len(made))), [row(one, 0.0) for one in made], [asked.look(one) for one in made])
    return columns


@pytest.mark.parametrize("make", [profiled, Learned])
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_all_at_once_are_what_each_of_them_is(make: type[Learned], seed: int) -> None:
    chance = Random(seed)
    predictor, made = make(), instances(chance)
    now = learn(predictor, made, chance) + chance.choice([0.0, 2.0, 10.0])
    asked = wide(predictor)
    assert asked is not None
    columns, prompt = table(asked, made), chance.choice([1, 2, 300, 1024, 16_000])
    cached = [chance.choice([0, prompt // 2, prompt - 1]) for _ in made]
    lender = chance.choice(made)
    columns.numbers.flags.writeable = columns.looks.flags.writeable = False
    answers = [
        (asked.ttfts(columns, prompt, 0), [predictor.ttft(one, prompt) for one in made]),
        (
            asked.ttfts(columns, prompt, columns.ahead * 0 + cached),
            [predictor.ttft(one, prompt, of) for one, of in zip(made, cached, strict=True)],
        ),
        (asked.works(columns, prompt), [predictor.work(one, prompt) for one in made]),
        (asked.sinces(columns, now), [predictor.since(one, now - one.stepped_at) for one in made]),
        (asked.tpots(columns, 0), [predictor.tpot(one, 0) for one in made]),
        (asked.tpots(columns, prompt), [predictor.tpot(one, prompt) for one in made]),
        (asked.fetches(columns, lender, prompt), [predictor.fetch(lender, one, prompt) for one in made]),
        (
            asked.fetches(columns, lender, columns.ahead * 0 + cached),
            [predictor.fetch(lender, one, of) for one, of in zip(made, cached, strict=True)],
        ),
    ]
    for found, wanted in answers:
        for one, other in zip(found.tolist(), wanted, strict=True):
            assert abs(one - other) <= margin(other) / 1_000  # far within what is reckoned with


def test_who_changes_an_answer_is_asked_one_by_one() -> None:
    class Mine(Learned):
        def tpot(self, instance: Instance, kv_tokens: int) -> float:
            return 0.01

    assert wide(Mine()) is None
    assert wide(Learned()) is not None
