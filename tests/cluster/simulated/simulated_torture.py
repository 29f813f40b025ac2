"""Bad days for the simulated cluster under the real scheduler, each made from one number.

    PYTHONPATH=src python tests/cluster/simulated/simulated_torture.py --runs 20000
    PYTHONPATH=src python tests/cluster/simulated/simulated_torture.py --first 9501 --runs 1
    PYTHONPATH=src python tests/cluster/simulated/simulated_torture.py --prefixes

In a day of some forty requests instances are lost, come back and fall silent, are drained and slid; requests
are cancelled and moved by hand, at any time; and ambushes hit an instance a moment after it got something to
do. `live` says the first thing that is wrong. What is held: every request ends once, with all of its tokens,
unless its client left, it could not move, or nothing was to come back; and nothing is left of it in any book
or on any engine. With `prefixes` they are conversations: prompts share beginnings, engines keep what they
have computed, on their hosts too, prefixes are fetched, and the scheduler knows at any moment what every
engine has.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random

from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster, job
from taichi_serve.cluster.simulated.agenda import Due
from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Arrived,
    Asked,
    Cached,
    Cancelled,
    Command,
    Decode,
    Drained,
    Event,
    Finished,
    Flow,
    Flowed,
    Hopeless,
    Joined,
    Lost,
    Outcome,
    Prefill,
    Prefilled,
    Silent,
    Slid,
    Tier,
)
from taichi_serve.request import State
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.stage import STAGES, Stage, step

LINEAR = StepCurve(((0, 0.01), (1000, 0.11)), 1e-8, 1e-7, 1e-5)
REQUESTS = 40
BLOCK = 16
FACTS = 60_000  # far more than any day has: then it goes round in circles
END = 8.0  # seconds after which nothing bad happens any more
SLIDERS = [
    Sliders(0, 1, 0, 128), Sliders(0, 3, 0, 128), Sliders(2, 2, 512, 64), Sliders(2, 1, 1024, 0),
    Sliders(1, 2, 1024, 64), Sliders(1, 1, 256, 16), Sliders(1, 3, 2048, 0), Sliders(3, 1, 512, 512),
]  # fmt: skip
POLICIES = [
    Policy(), Policy(watermark=0.6, hysteresis=0.1, dwell=0.0), Policy(watermark=1.0),
    Policy(watermark=0.8, dwell=0.05), Policy(watermark=0.5, dwell=0.0, ahead=True),
]  # fmt: skip


@dataclass(frozen=True)
class Ambush:
    """A moment after the `nth` decision of a kind something happens to its target, or to its source."""

    kind: type[Command]
    nth: int
    delay: float
    silent: bool
    source: bool


@dataclass
class Day:
    """All that will happen, but for what the ambushes add."""

    sliders: Sliders
    kv: int
    running: int
    latency: float
    policy: Policy
    calls: list[Call]
    happenings: list[Event]
    ambushes: list[Ambush]
    spared: str | None  # who is never ambushed
    host_kv: int = 0


def day(seed: int, final: bool = False, prefixes: bool = False) -> Day:
    """The day of this seed. In a `final` one nobody falls silent, who is lost stays lost, and one lives."""
    today = usual(seed, final)
    if not prefixes:
        return today
    c = Random(f"prefixes {seed}")
    bound = c.choice([0.0, 0.0, 0.2])
    calls = [talk(c, call.at, today.kv, final or c.random() >= bound) for call in today.calls[:20]]
    policy = replace(today.policy, fetch=c.random() < 0.7)
    return replace(today, calls=calls, host_kv=c.choice([0, 320, 4000]), policy=policy)


def talk(c: Random, at: float, most: int, movable: bool) -> Call:
    """A conversation of one to four turns, whose prompts begin as those of others do; `most` tokens."""
    topic, turns = c.randrange(3), c.randint(1, 4)
    chain = [c.getrandbits(40) if n >= 8 * topic else 100 * topic + n for n in range(most // BLOCK)]
    lengths, prompt = [], c.randint(1, 300)
    for _ in range(turns):
        output = c.randint(1, 80)
        if prompt + output > most:
            break
        lengths.append((prompt, output))
        prompt += output + c.randint(1, 60)
    then = None
    for prompt, output in reversed(lengths):
        blocks = tuple(chain[: (prompt + output) // BLOCK])
        first = (prompt, output) == lengths[0]
        then = Call(at if first else moment(c, 0.5), prompt, output, "", movable, blocks, then)
    assert then is not None
    return then


def usual(seed: int, final: bool) -> Day:
    """The day without prefixes."""
    c = Random(seed)
    sliders = c.choice(SLIDERS)
    calls, at, rate = [], 0.0, c.choice([20.0, 40.0, 80.0])
    bound = c.choice([0.0, 0.0, 0.2])
    for _ in range(REQUESTS):
        at += c.expovariate(rate)
        calls.append(Call(at, c.randint(1, 700), c.randint(1, 120), movable=final or c.random() >= bound))
    happenings: list[Event] = [*operators(c, sliders.instances)]
    kv = c.choice([1024, 1600, 3200, 6400])
    names = [f"i{n}" for n in range(sliders.instances)]
    if final:
        c.shuffle(names)
        happenings += [Lost(moment(c, 4.0), name, "killed") for name in names[1:] if c.random() < 0.4]
    else:
        for name in names:
            happenings += [*life(c, name, kv)]
        happenings += ending(c, names, kv)
    happenings.sort(key=lambda e: e.at)
    running, latency, policy = c.choice([256, 256, 8]), c.choice([0.002, 0.01, 0.05]), c.choice(POLICIES)
    ambushes = [ambush(c, final) for _ in range(c.choice([0, 0, 1, 3]))]
    spared = names[0] if final else None
    return Day(sliders, kv, running, latency, policy, calls, happenings, ambushes, spared)


def moment(c: Random, until: float) -> float:
    return round(c.uniform(0, until), 3)


def operators(c: Random, instances: int) -> Iterator[Event]:
    """Clients leave, requests are moved by hand, instances drained, sliders moved."""
    for _ in range(c.choice([0, 5])):
        yield Cancelled(moment(c, 5.0), f"r{c.randrange(REQUESTS)}")
    for _ in range(c.choice([0, 5, 15])):
        yield Asked(moment(c, 5.0), f"r{c.randrange(REQUESTS)}", f"i{c.randrange(instances)}")
    for _ in range(c.choice([0, 1, 3])):
        at, name = moment(c, 3.0), f"i{c.randrange(instances)}"
        yield Drained(at, name)
        if c.random() < 0.8:
            yield Drained(at + moment(c, 2.0), name, on=False)
    for _ in range(c.choice([0, 1, 3])):
        p, d_chunk = c.randint(0, instances), c.choice([0, 16, 64, 256])
        yield Slid(
            moment(c, 4.0), Sliders(p, instances - p, 512 if p else 0, d_chunk if p else max(16, d_chunk))
        )


def life(c: Random, name: str, kv: int) -> Iterator[Event]:
    """One instance is lost and comes back, and falls silent and is heard again, a few times or never."""
    at = 0.0
    for _ in range(c.choice([0, 0, 1, 2])):
        at += moment(c, 2.5)
        yield Lost(at, name, "killed")
        at += moment(c, 1.5)
        yield Joined(at, name, kv)
    for _ in range(c.choice([0, 0, 1, 2])):
        at = moment(c, 4.0)
        yield Silent(at, name)
        if c.random() < 0.3:  # it was hanging
            yield Lost(at + 0.3, name, "silent for too long")
        yield Silent(at + moment(c, 1.0), name, on=False)


def ending(c: Random, names: list[str], kv: int) -> list[Event]:
    """In the end who is silent is heard, and somebody comes back or nobody ever will."""
    heard: list[Event] = [Silent(END, name, on=False) for name in names]
    if c.random() < 0.2:
        return [*heard, *(Lost(END - 1, name, "killed") for name in names), Hopeless(END, "nothing starts")]
    return [*heard, *(Joined(END, name, kv) for name in names)]


def ambush(c: Random, final: bool) -> Ambush:
    kind, nth, delay = c.choice([Prefill, Decode, Flow]), c.randint(1, 12), c.choice([0.0, 0.001, 0.01, 0.03])
    return Ambush(kind, nth, delay, silent=not final and c.random() < 0.3, source=c.random() < 0.5)


@dataclass
class Tally:
    """What the days had in them."""

    stages: Counter[tuple[Stage, Stage]] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    facts: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    fetched: int = 0

    def step(self, request: str, before: Stage, after: Stage) -> Stage:
        """The table's own step, counted."""
        self.stages[before, after] += 1
        return step(request, before, after)

    def unseen(self) -> list[str]:
        """Rows of the table that no day has taken."""
        rows = [(a, b) for a, after in STAGES.items() for b in after if (a, b) not in self.stages]
        return sorted(f"{a.value} -> {b.value}" for a, b in rows)


class Life:
    """One day as it goes on, and what must hold in it."""

    def __init__(self, today: Day, tally: Tally) -> None:
        self.day = today
        self.tally = tally
        link = Link(bytes_per_token=1.0, bandwidth=1e5, latency=today.latency)
        shape = EngineShape(today.kv, today.running, BLOCK, today.host_kv, 1e6)
        self.cluster = SimulatedCluster(
            today.sliders, [LINEAR], shape, link, today.calls, today.happenings, today.kv
        )
        self.scheduler = GlobalScheduler(
            today.sliders, SLO(0.5, 0.03), Learned(), today.policy, self.cluster.capacities, BLOCK
        )
        self.arrived: dict[str, Arrived] = {}
        self.ended: dict[str, Outcome] = {}
        self.out: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.lost = self.hopeless = False
        self.sent: Counter[type[Command]] = Counter()

    def facts(self) -> None:
        """From the first fact to the last; raises AssertionError where something is wrong."""
        for number, event in enumerate(self.cluster.facts()):
            assert number < FACTS, "it goes round in circles"
            self.tally.facts[type(event).__name__] += 1
            self.hear(event)
            for command in self.scheduler.on(event):
                self.ambushed(command)
                self.cluster.send(command)
            if number % 5 == 0:
                self.books()
                if not isinstance(event, Cached):  # else the other tier's fact may be still to come
                    self.known()

    def hear(self, event: Event) -> None:
        match event:
            case Finished(request=name, outcome=outcome, output_tokens=output):
                assert name not in self.ended, f"{name} ended twice"
                assert output >= self.out.get(name, 0), f"{name} ended with {output} tokens, and had more"
                self.count(name, output)
                self.ended[name] = outcome
                self.tally.outcomes[outcome] += 1
            case Flowed(request=name, output_tokens=output):
                assert output > self.out.get(name, 0), f"{name} goes back to {output} tokens"
                self.out[name] = output
            case Cancelled(request=name):
                self.cancelled.add(name)
            case Arrived(request=name):
                self.arrived[name] = event
            case Prefilled(cached=cached, fetched=fetched):
                self.tally.cached += cached
                self.tally.fetched += fetched
            case Lost():
                self.lost = True
            case Hopeless():
                self.hopeless = True

    def count(self, name: str, output: int) -> None:
        """The scheduler counts by the steps of the instance, and comes to the same as the engines."""
        known = self.scheduler.requests.get(name)
        if known is not None and known.state is State.DECODING:
            counted = known.output_tokens(self.scheduler.ledger.home(known).ticks)
            assert counted == output, f"{name}: {output} tokens out, {counted} counted"

    def ambushed(self, command: Command) -> None:
        self.sent[type(command)] += 1
        for trap in self.day.ambushes:
            if isinstance(command, trap.kind) and self.sent[trap.kind] == trap.nth:
                assert isinstance(command, Prefill | Decode | Flow)
                known = self.scheduler.requests[command.request]
                where = known.instance if trap.source else known.target or known.instance
                at = self.cluster.agenda.now + trap.delay
                if where not in (None, self.day.spared) and at < END:
                    bad = Silent(at, where) if trap.silent else Lost(at, where, "ambushed")
                    self.cluster.agenda.push(at, Due.FACT, bad)

    def books(self) -> None:
        """No sum below zero, nobody waiting without need."""
        instances = self.scheduler.instances.values()
        for i in instances:
            sums = (
                i.decodes, i.arriving, i.reserved_tokens, i.leaving_tokens, i.queued_tokens,
                i.queued_requests, i.queued_attention, i.progress_tokens, i.running_tokens, i.queued_unused,
            )  # fmt: skip
            assert min(sums) >= 0, f"{i.name}: a sum below zero in {sums}"
            assert i.progress_tokens <= i.queued_tokens, f"{i.name}: more computed than queued"
        if any(i.alive for i in instances):
            assert not self.scheduler.ledger.waiting(), "somebody waits while an instance lives"
        if any(i.answers for i in instances):
            stuck = [i.name for i in instances if i.alive and i.silent and i.queued_requests]
            assert not stuck, f"prompts stay with {stuck}, who do not answer"

    def known(self) -> None:
        """The scheduler knows what every engine has, but for what it is told with the next step."""
        for name in self.cluster.engines:
            self.known_of(name)

    def known_of(self, name: str) -> None:
        engine, residency = self.cluster.engines[name], self.scheduler.ledger.residency
        if not engine.alive:
            assert not residency.holds(name, Tier.DEVICE) | residency.holds(name, Tier.HOST)
            return
        cache, here = engine.cache, engine.residents
        for tier, has, since in (
            (Tier.DEVICE, {*cache.users, *cache.idle}, cache.changes.since),
            (Tier.HOST, set(cache.host), cache.host.changes.since),
        ):
            told = {b for b in has | set(since) if not since.get(b, b not in has)}
            assert residency.holds(name, tier) == told, f"{name}: other blocks than it has, {tier}"
        assert 0 <= here.free <= here.blocks, f"{name}: {here.free} of {here.blocks} blocks are free"
        assert len(cache.users) <= here.blocks - here.free, f"{name}: more blocks are used than taken"

    def evening(self) -> None:
        """What must hold when the day is over."""
        stages = {name: (job.stage.value, job.leg) for name, job in self.cluster.jobs.items()}
        states = {name: (r.state.value, r.leg) for name, r in self.scheduler.requests.items()}
        assert not stages and not states, f"never ended: {stages}, {states}"
        assert len(self.arrived) >= len(self.day.calls), "not everybody came"
        for name, call in self.arrived.items():
            self.ending(name, call)
        assert self.scheduler.counters.outcomes == {o: [*self.ended.values()].count(o) for o in Outcome}
        for instance in self.scheduler.instances.values():
            self.clean(instance.name)

    def ending(self, name: str, call: Arrived) -> None:
        outcome = self.ended.get(name)
        assert outcome is not None, f"{name} never ended"
        if outcome is Outcome.CANCELLED:
            assert name in self.cancelled, f"{name} was cancelled by nobody"
        elif outcome is Outcome.FAILED:
            assert self.hopeless or (self.lost and not call.movable), f"{name} failed"

    def clean(self, name: str) -> None:
        engine, ledger = self.cluster.engines[name], self.scheduler.instances[name]
        sums = (
            ledger.decodes, ledger.arriving, ledger.queued_tokens, ledger.queued_requests,
            ledger.queued_attention, ledger.reserved_tokens, ledger.leaving_tokens, ledger.context_base,
            ledger.progress_tokens, len(self.scheduler.ledger.residents[name]), ledger.queued_unused,
            len(self.scheduler.ledger.residency.claims(name)),
        )  # fmt: skip
        assert not any(sums), f"{name}: {sums} in the ledger of nobody"
        assert engine.alive == ledger.alive, f"{name}: alive or not?"
        if engine.alive:
            assert engine.chunk == ledger.chunk, f"{name}: chunk {engine.chunk}, and {ledger.chunk} believed"
            here = engine.residents
            assert here.free == here.blocks, f"{name}: {here.blocks - here.free} blocks belong to nobody"
            assert (here.decodes, here.context) == (0, 0), f"{name}: residents left"
            lists = (engine.waiting, engine.inbound, engine.landed, engine.partial, engine.running)
            lists = (*lists, engine.leaving, engine.pulls, engine.missing, engine.reads, engine.cache.users)
            assert not any(lists), f"{name}: left in a list"


def live(seed: int, tally: Tally | None = None, final: bool = False, prefixes: bool = False) -> str | None:
    """What went wrong on the day of this seed, None if nothing did."""
    tally = tally or Tally()
    job.step = tally.step  # type: ignore[attr-defined]
    try:
        today = Life(day(seed, final, prefixes), tally)
        today.facts()
        today.evening()
    except Exception as wrong:  # noqa: BLE001  # whatever it is, it is what this is looking for
        return f"{type(wrong).__name__}: {wrong}"
    finally:
        job.step = step  # type: ignore[attr-defined]
    return None


def main() -> int:
    """Live many days, and say which were bad."""
    parser = argparse.ArgumentParser(description="Bad days for the simulated cluster.")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with")
    parser.add_argument(
        "--final", action="store_true", help="who is lost stays lost, and nobody falls silent"
    )
    parser.add_argument("--prefixes", action="store_true", help="conversations, with prefix caches")
    args = parser.parse_args()
    tally, bad = Tally(), 0
    for seed in range(args.first, args.first + args.runs):
        if wrong := live(seed, tally, args.final, args.prefixes):
            bad += 1
            sys.stdout.write(f"{seed}: {wrong}\n")
    for (before, after), count in sorted(tally.stages.items(), key=lambda row: -row[1]):
        sys.stdout.write(f"{count:>10} {before.value} -> {after.value}\n")
    sys.stdout.write(f"never: {', '.join(tally.unseen()) or 'none'}\n")
    sys.stdout.write(
        f"{', '.join(f'{n} {o.value}' for o, n in tally.outcomes.items())}; {dict(tally.facts)}\n"
    )
    sys.stdout.write(f"{tally.cached} tokens cached, {tally.fetched} fetched\n")
    sys.stdout.write(f"{args.runs} runs, {bad} bad\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
