"""Among many instances a few are asked, and the choice is that of asking everybody."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taichi_serve.latency.columns import row
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.predict import Learned, Predictor
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.messages import (
    Arrived,
    Asked,
    Cached,
    Command,
    Decline,
    Decode,
    Drained,
    Event,
    Finished,
    Flow,
    Flowed,
    Joined,
    Lost,
    Placed,
    Prefill,
    Prefilled,
    Refused,
    Silent,
    Slid,
    Stepped,
    Tier,
)
from taichi_serve.request import Request, State
from taichi_serve.scheduling import fleet
from taichi_serve.scheduling.policy import DEMOTE, REFUSE, SERVE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

MODEL = Roofline(launch=0.002, mixed=0.001, token=1e-4, attention=2e-9, decode=5e-5, kv=1.2e-7, knee=192)
PAIRS = {(a, b): Transfer(a, b, 0.002, 2e10) for a in Kind for b in Kind}
BLOCK = 16
COUNT = 12


def profiled() -> Predictor:
    return Profiled(MODEL, PAIRS, 200_000)


def plain(commands: Iterable[Command]) -> list[Command]:
    """Decisions without what was predicted for those who were not chosen."""
    found: list[Command] = []
    for one in commands:
        match one:
            case Prefill():
                kept = tuple(f for f in one.forecasts if f.instance == one.on)
                found.append(replace(one, forecasts=kept))
            case Decline():
                found.append(replace(one, forecasts=()))
            case Decode():
                found.append(replace(one, outlooks=tuple(o for o in one.outlooks if o.instance == one.on)))
            case Flow():
                found.append(replace(one, outlooks=tuple(o for o in one.outlooks if o.instance == one.to)))
            case _:
                found.append(one)
    return found


class Pair:
    """Two schedulers that are told the same: one that asks everybody, and one that asks a few."""

    def __init__(
        self, make: type[Learned], sliders: Sliders, policy: Policy, capacity: int, seats: int
    ) -> None:
        room = {f"i{n}": capacity for n in range(sliders.instances)}
        self.everybody, self.few = (
            GlobalScheduler(sliders, SLO(1.0, 0.05), make(), policy, room, BLOCK, seats) for _ in range(2)
        )
        self.few._dispatcher.fleet.least = 1
        self.everybody._dispatcher.fleet.least = 1_000
        self.asked = self.placed = 0

    def on(self, event: Event) -> list[Command]:
        wanted, found = self.everybody.on(event), self.few.on(event)
        assert plain(found) == plain(wanted)
        for one in found:
            if isinstance(one, Prefill):
                self.placed += 1
                self.asked += len(one.forecasts)
        self.check()
        return found

    def check(self) -> None:
        """The columns are what the books say."""
        ours = self.few._dispatcher.fleet
        for request in list(self.few.requests.values())[:3]:
            assert dict(ours.prefixes(request)) == dict(self.few.ledger.prefixes(request))
        columns = ours.fresh()
        for number, one in enumerate(ours.instances):
            latest = self.few.ledger.queues[one.name].latest()
            assert columns.numbers[:, number].tolist() == [*map(float, row(one, latest))]
            assert ours.asked is not None
            assert columns.looks[:, number].tolist() == [*map(float, ours.asked.look(one))]
        assert ours.standing() == fleet.Standing.of(self.few.instances.values())


def town(chance: Random, make: type[Learned], overload: str = SERVE) -> Pair:
    """Some P-heavy and some D-heavy instances, in one of the three ways of serving."""
    high = chance.choice([0, 2, 5])
    d_chunk = chance.choice([128, 256]) if not high else chance.choice([0, 128, 256])
    policy = Policy(
        watermark=chance.choice([0.6, 0.95, 1.0]),
        ttft_margin=chance.choice([0.05, 0.5, 1.0]),
        tpot_margin=chance.choice([0.1, 0.5, 0.8]),
        dwell=0.0,
        fetch=chance.random() < 0.6,
        fetch_within=chance.choice([0.05, 10.0]),
        ahead=chance.random() < 0.5,
        overload=overload,
    )
    sliders = Sliders(high, COUNT - high, 1024, d_chunk)
    return Pair(make, sliders, policy, chance.choice([4_000, 40_000]), chance.choice([2, 256]))


def live(pair: Pair, chance: Random, rounds: int) -> None:
    """Arrivals, steps and all that follows them, moves that are refused, instances that come and go."""
    names = list(pair.few.instances)
    systems = [tuple(chance.getrandbits(64) for _ in range(40)) for _ in range(2)]
    now, number = 0.0, 0
    if chance.random() < 0.5:  # on three hosts, between which moves take longer (act)
        for name in names:
            pair.on(Placed(now, name, chance.choice("abc")))
    for _ in range(rounds):
        now += chance.choice([0.0, 0.001, 0.02, 2.0 if chance.random() < 0.05 else 0.01])
        requests = list(pair.few.requests.values())
        what = chance.random()
        if what < 0.35 or not requests:
            prompt = chance.choice([20, 100, 100, 700, 700, 3_000])
            blocks = chance.choice(systems)[: prompt // BLOCK]
            blocks += tuple(chance.getrandbits(64) for _ in range(prompt // BLOCK - len(blocks)))
            slo = chance.choice([None, None, SLO(0.3, 0.02), SLO(5.0, 0.5)])
            of = chance.choice([1, 5, 400])
            event = Arrived(now, f"r{number}", prompt, of, chance.random() < 0.9, None, blocks, slo)
            number += 1
            pair.on(event)
        elif what < 0.6:
            name = chance.choice(names)
            one = pair.few.instances[name]
            tokens = min(one.chunk, one.queued_prefill_tokens)
            kv = chance.choice([one.context_tokens, int(one.kv_capacity * chance.random())])
            seconds = chance.choice([0.01, 0.03, 0.3])
            missed = tuple(r.id for r in requests[:1]) if chance.random() < 0.1 else ()
            pair.on(Stepped(now, name, seconds, tokens, one.decodes, kv, 0, missed))
        elif what < 0.9:
            act(pair, chance, now, chance.choice(requests), names)
        else:
            happen(pair, chance, now, chance.choice(names), systems)


def act(pair: Pair, chance: Random, now: float, request: Request, names: list[str]) -> None:
    """Something becomes of one request."""
    leg, sure = request.leg, chance.random() < 0.85
    match request.state:
        case State.PREFILLING if sure:
            pair.on(Prefilled(now, request.id, leg, request.instance or "", 0, request.hand_over))
        case State.MOVING if sure:
            hosts = {pair.few.instances[n].host for n in (request.instance, request.target) if n}
            gap = 0.02 if len(hosts) < 2 else chance.choice([0.1, 0.5])
            pair.on(Flowed(now, request.id, leg, request.target or "", 2, request.prompt_tokens, gap))
        case State.PREFILLING | State.MOVING:
            pair.on(Refused(now, request.id, leg, "no room"))
        case State.DECODING if chance.random() < 0.5:
            pair.on(Asked(now, request.id, chance.choice(names)))
        case _:
            pair.on(Finished(now, request.id, 9))


def happen(pair: Pair, chance: Random, now: float, name: str, systems: list[tuple[int, ...]]) -> None:
    """Something becomes of an instance."""
    one = pair.few.instances[name]
    match chance.randint(0, 9):
        case 0:
            pair.on(Joined(now, name, 20_000) if not one.alive else Lost(now, name, "killed"))
        case 1:
            pair.on(Silent(now, name, not one.silent))
        case 2:
            pair.on(Drained(now, name, not one.draining))
        case 3:
            sliders = pair.few.sliders
            chunk = 128 if not sliders.p_heavy else chance.choice([0, 64, 256])
            pair.on(Slid(now, replace(sliders, d_chunk=chunk)))
        case _ if one.alive:
            tier = chance.choice(list(Tier))
            pair.on(Cached(now, name, chance.choice(systems)[: chance.randint(1, 40)], tier=tier))


@pytest.mark.parametrize("make", [profiled, Learned], ids=["profiled", "learned"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_a_few_are_asked_and_the_choice_is_that_of_asking_everybody(make: type[Learned], seed: int) -> None:
    chance = Random(seed)
    live(town(chance, make), chance, 120)


@pytest.mark.parametrize("overload", [DEMOTE, REFUSE])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_who_judges_by_deadlines_decides_the_same_too(overload: str, seed: int) -> None:
    chance = Random(seed)
    live(town(chance, profiled, overload), chance, 120)  # type: ignore[arg-type]


def test_of_a_hundred_idle_instances_one_is_asked_and_it_is_the_first() -> None:
    capacities = {f"i{n}": 100_000 for n in range(100)}
    scheduler = GlobalScheduler(Sliders(50, 50, 1024, 256), SLO(4.0, 0.07), profiled(), Policy(), capacities)
    (command,) = scheduler.on(Arrived(0.0, "r0", 600, 100))
    assert isinstance(command, Prefill)
    assert [one.instance for one in command.forecasts] == ["i50"]  # D-heavy ones come first
    (command,) = scheduler.on(Arrived(0.0, "r1", 600, 100))
    assert isinstance(command, Prefill)
    assert command.on == "i51"


def test_up_to_32_instances_everybody_is_asked() -> None:
    for count in (32, 33):
        capacities = {f"i{n}": 100_000 for n in range(count)}
        sliders = Sliders(16, count - 16, 1024, 256)
        scheduler = GlobalScheduler(sliders, SLO(4.0, 0.07), profiled(), Policy(), capacities)
        (command,) = scheduler.on(Arrived(0.0, "r0", 600, 100))
        assert isinstance(command, Prefill)
        assert len(command.forecasts) == (32 if count == 32 else 1)


def test_few_are_asked_while_all_are_busy_and_none_is_like_another() -> None:
    chance = Random(7)
    pair = town(chance, profiled)  # type: ignore[arg-type]
    live(pair, chance, 400)
    assert pair.placed > 50
    assert pair.asked < 4 * pair.placed
