"""What must hold where seats are few, whatever happens: on the ragged model cluster of test_properties.py,
whose instances run so many requests at once and no more.

TAICHI_SEAT_STORIES=20000 tells so many stories in place of 300.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import CAPACITY, Model, long_story, play

from taichi_serve.classes import SLOClass
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Command, Decline, Decode, Demote, Event, Flow, Move, Prefill
from taichi_serve.scheduling.policy import OVERLOAD, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

STORIES, DEEDS = int(os.environ.get("TAICHI_SEAT_STORIES", "300")), 150
SERVERS = SLO(0.2, 0.05)
CLASSES = (
    SLOClass("light"),
    SLOClass("heavy", weight=4.0),
    SLOClass("kept", refuse=False),
    SLOClass("sure", demote=False, weight=2.0),
)
ALIKE = (Sliders(2, 2, 128, 32), Sliders(0, 3, 0, 64), Sliders(2, 1, 256, 0), Sliders(1, 3, 64, 64))


class Seated(Model):
    """Looks at every decision for seats that it promises and nobody has."""

    def tell(self, event: Event) -> None:
        before = len(self.sent)
        super().tell(event)
        sent = [command for command in self.sent[before:] if isinstance(command, (Prefill, Decode, Flow))]
        for on in {target for command in sent if (target := promised(command))}:
            waiting = sum(goes(command) == on and not promised(command) for command in sent)
            assert self.scheduler.instances[on].seats_left + waiting >= 0, sent

    def check(self) -> None:
        super().check()
        for name, one in self.scheduler.instances.items():
            assert one.seats == self.seats
            here = [
                w for w in self.work.values() if w.on == name and w.out and not (w.to or w.held or w.seat)
            ]
            assert self.running(name) <= one.seats
            assert one.decodes <= one.seats + len(here)  # whose moves were refused
            assert one.seats_left == self.seats - one.decodes - one.arriving - (
                one.queued_requests if one.kind is Kind.D_HEAVY else 0
            )

    def assert_all_served_once_and_nothing_left(self) -> None:
        super().assert_all_served_once_and_nothing_left()
        scheduler = self.scheduler
        assert all(one.seats_left == self.seats for one in scheduler.instances.values())
        assert not scheduler.ledger.best_effort
        assert not any(map(len, scheduler.ledger.queues.values()))
        assert sum(scheduler.counters.outcomes.values()) == self.arrived


def goes(command: Prefill | Decode | Flow) -> str:
    return command.to if isinstance(command, Flow) else command.on


def promised(command: Command) -> str | None:
    """The instance on which this says that there is a seat; None where it may be waited for."""
    match command:
        case Flow(to=to, move=Move.DEGRADE | Move.BACKFLOW):
            return to
        case Decode(on=on, move=Move.HAND_OVER, why=why) if "with most room" in why or "has room" in why:
            return None if why == "no D-heavy instance has room" else on
        case Prefill(on=on, forecasts=forecasts):
            return next((on for f in forecasts if f.instance == on and f.feasible), None)
    return None


def told(seed: int) -> Seated:
    """A story with few seats, in a mode, with or without classes, all drawn from the seed."""
    chance = Random(seed)
    sliders, seats = chance.choice(ALIKE), chance.randint(1, 6)
    classes = CLASSES if chance.random() < 0.7 else ()
    watermark = 1.0 if sliders.d_chunk == 0 else 0.5
    policy = Policy(
        watermark=watermark, hysteresis=0.1, dwell=0.0, overload=chance.choice(OVERLOAD), classes=classes,
        fair=bool(classes) and chance.random() < 0.5,
    )  # fmt: skip
    capacities = {f"i{n}": CAPACITY for n in range(sliders.instances)}
    m = Seated(GlobalScheduler(sliders, SERVERS, Learned(), policy, capacities, seats=seats), seats=seats)
    m.terms = ((None, None), *((one.slo(SERVERS), one.name) for one in classes))
    for deed in islice(long_story(chance), DEEDS):
        play(m, deed)
        m.check()
    return m


@settings(max_examples=STORIES, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nobody_runs_without_a_seat_or_waits_for_ever_and_every_seat_is_given_back(seed: int) -> None:
    m = told(seed)
    m.settle()
    m.assert_all_served_once_and_nothing_left()


def test_seats_are_short_in_these_stories_and_everything_happens_for_it() -> None:
    seen: Counter[type[Command]] = Counter()
    moves: Counter[Move] = Counter()
    waited = full = 0
    for seed in range(60):
        m = told(seed)
        seen.update(map(type, m.sent))
        moves.update(c.move for c in m.sent if isinstance(c, (Decode, Flow)))
        waited += sum(isinstance(c, Decode) and c.why.startswith("waits for a seat") for c in m.sent)
        full += sum(isinstance(c, Prefill) and not any(f.fits for f in c.forecasts) for c in m.sent)
    assert seen.keys() >= {Prefill, Decode, Flow, Demote, Decline}
    assert moves.keys() == set(Move)
    assert waited > 10
    assert full > 100
