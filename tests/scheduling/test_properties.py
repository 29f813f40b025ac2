"""What must hold whatever happens, on a small model cluster that hypothesis drives.

The cluster is ragged on purpose: moves are refused, prompts are cached, steps are missed, instances die, and
facts that are out of date are sent again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taichi_serve.classes import SLOClass
from taichi_serve.instance import UNBOUNDED
from taichi_serve.latency.model import prompt_attention
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import (
    Abort,
    Added,
    Arrived,
    Asked,
    Cached,
    Cancelled,
    Command,
    Decline,
    Decode,
    Demote,
    Drained,
    Event,
    Finished,
    Flow,
    Flowed,
    Hopeless,
    Joined,
    Lost,
    Move,
    Prefill,
    Prefilled,
    Refused,
    Removed,
    SetChunk,
    Silent,
    Slid,
    Stepped,
    Tier,
)
from taichi_serve.request import State
from taichi_serve.scheduling.policy import DEMOTE, OVERLOAD, REFUSE, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

CAPACITY = 2_000
BLOCK = 16


@dataclass
class Work:
    """A request as the model cluster sees it."""

    name: str
    prompt: int
    output: int
    leg: int = 0
    on: str = ""  # where it prefills or decodes
    to: str = ""  # where it goes
    done: int = 0  # prompt tokens computed
    out: int = 0
    blocks: tuple[int, ...] = ()
    cached: int = 0
    hand_over: bool = False
    held: bool = False
    seat: bool = False  # it runs


@dataclass
class Model:
    """Instances that step in turn; every command is obeyed at the next step, or refused."""

    scheduler: GlobalScheduler
    work: dict[str, Work] = field(default_factory=dict)
    now: float = 0.0
    chunks: dict[str, int] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)
    sent: list[Command] = field(default_factory=list)
    arrived: int = 0
    stale: list[Event] = field(default_factory=list)
    terms: tuple[tuple[SLO | None, str | None], ...] = ((None, None),)  # of requests, in turn
    caches: dict[str, set[int]] = field(default_factory=dict)  # where prompts have blocks
    seats: int = UNBOUNDED  # requests that an instance runs at once

    def __post_init__(self) -> None:
        self.chunks = {i.name: i.chunk for i in self.scheduler.instances.values()}
        self.caches = {name: set() for name in self.chunks}
        self.born = len(self.chunks)

    def tell(self, event: Event) -> None:
        self.now += 0.001
        if isinstance(event, (Prefilled, Flowed, Refused, Finished)):
            self.stale.append(event)
        for command in self.scheduler.on(event):
            self.sent.append(command)
            self.obey(command)

    def obey(self, command: Command) -> None:
        if isinstance(command, SetChunk):
            self.chunks[command.instance] = command.chunk
            return
        work = self.work[command.request]
        match command:
            case Prefill(on=on, leg=leg, hand_over=hand_over):
                self.assert_able(on)
                assert leg > work.leg or (leg, work.on) == (0, "")
                work.on, work.leg, work.hand_over, work.done, work.seat = on, leg, hand_over, 0, False
                self.work[work.name] = self.work.pop(work.name)  # to the end of the queue
            case Decode(on=on, leg=leg):
                self.assert_able(on)
                work.to, work.leg, work.seat = on, leg, False
            case Flow(to=to, leg=leg):
                self.assert_able(to)
                assert work.to == "" or work.on == ""
                work.to, work.leg, work.seat = to, leg, False
            case Demote(leg=leg):
                assert (work.leg, work.out) == (leg, 0)
            case Abort() | Decline():
                self.ended[work.name] += 1
                del self.work[work.name]

    def assert_able(self, instance: str) -> None:
        """It lives; and answers, unless none that lives does."""
        assert instance not in self.dead
        assert instance not in self.silent or self.silent | self.dead == set(self.chunks)

    def arrive(self, prompt: int, output: int, movable: bool) -> None:
        name = f"r{self.arrived}"
        self.arrived += 1
        blocks = chain(prompt) if self.scheduler.ledger.residency.block_size else ()
        self.work[name] = Work(name, prompt, output, blocks=blocks)
        slo, of = self.terms[(self.arrived - 1) % len(self.terms)]
        self.tell(Arrived(self.now, name, prompt, output, movable, None, blocks, slo, of))

    def held_tokens(self, instance: str) -> int:
        return sum(w.done + w.out for w in self.work.values() if w.on == instance)

    def step(self, instance: str, miss: bool, refuse: bool) -> None:
        if instance in self.dead | self.silent:
            return
        budget, prefilled, landed, grown, stuck = self.chunks[instance], [], [], [], list[Work]()
        before, free = budget, self.seats - self.running(instance)
        for w in self.in_order(instance):
            if w.on == instance and not w.to and w.out == 0 and budget and (w.seat or free > 0):
                free, w.seat = free - (not w.seat), True
                if not w.done:
                    w.done = w.cached = self.found(w)
                took = min(budget, w.prompt - w.done)
                budget, w.done = budget - took, w.done + took
                if w.done == w.prompt:
                    prefilled.append(w)
            elif w.to == instance and not refuse and free > 0:
                free -= 1
                landed.append(w)
            elif w.on == instance and not w.to and w.out and not w.held:
                if not w.seat and free <= 0:  # its move was refused, and another has its seat
                    stuck.append(w)
                    continue
                free, w.seat = free - (not w.seat), True
                grown.append(w)
        missed = grown[:1] if miss else []
        for w in grown[len(missed) :]:
            w.out += 1
        self.remember(instance, prefilled, miss)
        seconds = 0.04 if self.scheduler.instances[instance].kind is Kind.P_HEAVY else 0.02
        self.tell(
            Stepped(
                self.now, instance, seconds, before - budget, len(grown), self.held_tokens(instance), 0,
                tuple(w.name for w in missed + stuck),
            )
        )  # fmt: skip
        self.facts(instance, prefilled, landed, refuse)

    def running(self, instance: str) -> int:
        """How many have a seat: they have begun here, and were not told to go elsewhere."""
        return sum(w.on == instance and w.seat for w in self.work.values())

    def in_order(self, instance: str) -> list[Work]:
        """Where prompts have places the instance computes them in the order that the ledger believes in: what
        is planned already is overtaken by nobody. Else in order of arrival."""
        queue = self.scheduler.ledger.queues[instance]
        order = {name: number for number, name in enumerate(queue)} if queue.ordered else {}
        return sorted(self.work.values(), key=lambda w: order.get(w.name, -1))

    def facts(self, instance: str, prefilled: list[Work], landed: list[Work], refuse: bool) -> None:
        for w in prefilled:
            if w.name in self.work and w.on == instance:
                w.out, w.held, w.seat = 1, w.hand_over, not w.hand_over
                self.tell(Prefilled(self.now, w.name, w.leg, instance, w.cached, held=w.hand_over))
        for w in landed:
            if w.name in self.work and w.to == instance:
                kv = w.prompt if w.on else 0
                w.on, w.to, w.held, w.out, w.done = instance, "", False, max(1, w.out) + 1, w.prompt
                w.seat = True
                self.tell(Flowed(self.now, w.name, w.leg, instance, w.out, kv, 0.03))
        for w in [w for w in self.work.values() if refuse and w.to == instance]:
            w.to, w.held = "", False
            self.tell(Refused(self.now, w.name, w.leg, "no room"))
        queue = [w for w in self.work.values() if w.on == instance and not (w.done or w.out or w.to)]
        for w in queue[:1] if refuse else ():
            w.on = ""
            self.tell(Refused(self.now, w.name, w.leg, "not taken in"))
        for w in [w for w in self.work.values() if w.on == instance and not w.to and w.out >= w.output]:
            self.ended[w.name] += 1
            del self.work[w.name]
            self.tell(Finished(self.now, w.name, w.out))

    def found(self, w: Work) -> int:
        """Tokens of a prompt that its instance has in its cache when it begins."""
        cache, most = self.caches[w.on], (w.prompt - 1) // BLOCK
        return (
            next((n for n, b in enumerate(w.blocks[:most]) if b not in cache), most) * BLOCK if cache else 0
        )

    def remember(self, instance: str, prefilled: list[Work], forget: bool) -> None:
        """Blocks of prompts that are through are cached, and a few others are not any more."""
        cache = self.caches[instance]
        gone = set(sorted(cache)[::3]) if forget else set()
        new = {b for w in prefilled for b in w.blocks} - cache - gone
        if new or gone:
            self.caches[instance] = (cache | new) - gone
            self.tell(Cached(self.now, instance, tuple(new), tuple(gone)))

    def lose(self, instance: str) -> None:
        self.dead.add(instance)
        self.caches[instance] = set()
        for w in self.work.values():
            if w.on == instance:
                w.on, w.done, w.held, w.seat = "", 0, False, False
            if w.to == instance:
                w.to = ""
        self.silent.discard(instance)
        self.tell(Lost(self.now, instance, "killed"))

    def join(self, instance: str) -> None:
        self.dead.remove(instance)
        self.chunks[instance] = 0
        self.tell(Joined(self.now, instance, CAPACITY))

    def name(self, number: int) -> str:
        """One of those that are there."""
        names = list(self.scheduler.instances)
        return names[number % len(names)]

    def add(self, kind: Kind) -> None:
        instance, self.born = f"i{self.born}", self.born + 1
        self.chunks[instance], self.caches[instance] = 0, set()
        self.tell(Added(self.now, instance, kind, CAPACITY))

    def remove(self, instance: str) -> None:
        self.dead.add(instance)
        for w in self.work.values():
            if w.on == instance:
                w.on, w.done, w.held, w.seat = "", 0, False, False
            if w.to == instance:
                w.to = ""
        self.silent.discard(instance)
        self.tell(Removed(self.now, instance))
        self.dead.remove(instance)
        del self.chunks[instance], self.caches[instance]

    def silence(self, instance: str, on: bool) -> None:
        if on and instance not in self.dead:
            self.silent.add(instance)
        elif not on:
            self.silent.discard(instance)
        self.tell(Silent(self.now, instance, on))

    def check(self) -> None:
        """The ledger's sums are the cluster's."""
        assert set(self.scheduler.requests) == set(self.work)
        assert set(self.scheduler.instances) == set(self.chunks) == set(self.scheduler.accuracy)
        assert self.scheduler.sliders.instances == len(self.chunks)
        up = set(self.chunks) - self.dead
        assert not (up and any(r.state is State.WAITING for r in self.scheduler.requests.values()))
        assert not (up - self.silent and any(self.scheduler.ledger.queues[name] for name in self.silent))
        assert all(self.scheduler.instances[name].chunk == self.chunks[name] for name in up)
        for name, i in self.scheduler.instances.items():
            here = [w for w in self.work.values() if w.on == name]
            there = [w for w in self.work.values() if w.to == name]
            requests = self.scheduler.requests
            decoding = [w for w in here if requests[w.name].state is State.DECODING]
            queued = [w for w in here if requests[w.name].state is State.PREFILLING]
            assert i.decodes == len(decoding)
            assert i.context_tokens == sum(w.prompt + w.out for w in decoding)
            assert i.queued_requests == len(queued)
            assert i.queued_tokens == sum(w.prompt - requests[w.name].cached for w in queued)
            if not self.scheduler.ledger.residency.block_size:  # else what is cached is a belief
                assert i.queued_prefill_tokens == sum(w.prompt - w.done for w in queued)
            self.check_prefixes(name, here, queued)
            assert 0 <= i.running_tokens <= i.queued_prefill_tokens
            assert i.arriving == len(there)
            assert i.reserved_tokens == sum(requests[w.name].reserved for w in there)
            assert i.leaving_tokens == sum(requests[w.name].reserved for w in here if w.to)
            assert len(self.scheduler.ledger.residents[name]) == sum(
                requests[w.name].movable for w in decoding
            )
            for w in decoding:
                assert requests[w.name].output_tokens(i.ticks) == w.out

    def check_prefixes(self, name: str, here: list[Work], queued: list[Work]) -> None:
        i, residency = self.scheduler.instances[name], self.scheduler.ledger.residency
        requests = [self.scheduler.requests[w.name] for w in queued]
        assert i.queued_attention == sum(prompt_attention(r.prompt_tokens, r.cached) for r in requests)
        assert i.queued_unused == sum(r.unused for r in requests)
        assert all(0 <= r.unused <= r.cached < r.prompt_tokens for r in requests)
        assert residency.holds(name, Tier.DEVICE) == self.caches[name]
        assert Counter(residency.claims(name)) == Counter(b for w in here for b in w.blocks[15::16])

    def settle(self) -> None:
        """Bring everybody back, and run until everybody is served."""
        for name in sorted(self.dead):
            self.join(name)
        for name in sorted(self.silent):
            self.silence(name, on=False)
        for _ in range(3_000):
            if not self.work:
                return
            for name in self.scheduler.instances:
                self.step(name, miss=False, refuse=False)
        raise AssertionError(f"never served: {self.work}")

    def assert_all_served_once_and_nothing_left(self) -> None:
        assert self.ended == Counter({f"r{n}": 1 for n in range(self.arrived)})
        assert not self.scheduler.requests
        for i in self.scheduler.instances.values():
            figures = (i.decodes, i.arriving, i.queued_tokens, i.queued_requests, i.queued_attention)
            assert figures == (0, 0, 0, 0, 0)
            assert (i.progress_tokens, i.reserved_tokens, i.leaving_tokens, i.context_base) == (0, 0, 0, 0)
            assert (i.queued_unused, dict(self.scheduler.ledger.residency.claims(i.name))) == (0, {})


def chain(prompt: int) -> tuple[int, ...]:
    """Hashes of a prompt that shares its first blocks with others: all with the first two, some with more."""
    return tuple(n if n < 2 else 100 * (prompt % 3) + n for n in range(prompt // BLOCK))


def model(sliders: Sliders, policy: Policy, block_size: int = 0) -> Model:
    capacities = {f"i{n}": CAPACITY for n in range(sliders.instances)}
    return Model(GlobalScheduler(sliders, SLO(0.2, 0.01), Learned(), policy, capacities, block_size))


REQUESTS = st.tuples(st.just("arrive"), st.integers(1, 400), st.integers(2, 60), st.booleans())
STEPS = st.tuples(st.just("step"), st.integers(0, 3), st.booleans(), st.sampled_from([False, False, True]))
MOVABLE = REQUESTS.map(lambda deed: (*deed[:3], True))
GRANTED = STEPS.map(lambda deed: (*deed[:3], False))  # no move is refused
OPERATORS = st.one_of(
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("ask"), st.integers(0, 30), st.integers(0, 3)),
    st.tuples(st.just("drain"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("slide"), st.integers(0, 3), st.sampled_from([0, 16, 64])),
    st.tuples(st.just("lose"), st.integers(0, 3)),
    st.tuples(st.just("join"), st.integers(0, 3)),
    st.tuples(st.just("silence"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("despair"), st.booleans()),
    st.tuples(st.just("stale"), st.integers(0, 50)),
)


def play(m: Model, deed: tuple[object, ...]) -> None:
    match deed:
        case ("arrive", int(prompt), int(output), bool(movable)):
            m.arrive(prompt, output, movable)
        case ("step", int(n), bool(miss), bool(refuse)):
            m.step(m.name(n), miss, refuse)
        case ("cancel", int(n)):
            m.tell(Cancelled(m.now, f"r{n}"))
        case ("ask", int(n), int(to)):
            m.tell(Asked(m.now, f"r{n}", m.name(to)))
        case ("drain", int(n), bool(on)):
            m.tell(Drained(m.now, m.name(n), on))
        case ("slide", int(p), int(chunk)):
            chunk = chunk if p else max(chunk, 16)
            p = min(p, len(m.chunks))
            m.tell(Slid(m.now, Sliders(p, len(m.chunks) - p, 128 if p else 0, chunk)))
        case ("stale", int(n)) if n < len(m.stale):
            late = m.stale[n]
            assert not isinstance(late, (Stepped, Lost, Slid))
            m.scheduler.on(late)
        case _:
            supervise(m, deed)


def supervise(m: Model, deed: tuple[object, ...]) -> None:
    match deed:
        case ("lose", int(n)) if m.name(n) not in m.dead:
            m.lose(m.name(n))
        case ("join", int(n)) if m.name(n) in m.dead:
            m.join(m.name(n))
        case ("silence", int(n), bool(on)):
            m.silence(m.name(n), on)
        case ("add", Kind() as kind):
            m.add(kind)
        case ("remove", int(n)) if len(m.chunks) > 1:
            m.remove(m.name(n))
        case ("despair", _):
            m.tell(Hopeless(m.now, "it failed five times in an hour"))


@settings(max_examples=100, deadline=None)
@given(deeds=st.lists(st.one_of(REQUESTS, STEPS, STEPS, OPERATORS), max_size=80))
def test_no_request_is_lost_or_doubled_and_ledgers_equal_the_cluster(deeds: list[tuple[object, ...]]) -> None:
    m = model(Sliders(2, 2, 128, 32), Policy(watermark=0.5, hysteresis=0.1, dwell=0.0))
    for deed in deeds:
        play(m, deed)
        m.check()
    m.settle()
    m.assert_all_served_once_and_nothing_left()


COMERS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(Kind)), st.tuples(st.just("remove"), st.integers(0, 7))
)


@settings(max_examples=200, deadline=None)
@given(
    deeds=st.lists(st.one_of(REQUESTS, STEPS, STEPS, OPERATORS, COMERS, COMERS), max_size=80),
    block_size=st.sampled_from([0, BLOCK]),
)
def test_it_holds_while_instances_come_and_leave(deeds: list[tuple[object, ...]], block_size: int) -> None:
    policy = Policy(watermark=0.5, hysteresis=0.1, dwell=0.0)
    m = model(Sliders(1, 1, 128, 32), policy, block_size)
    for deed in deeds:
        play(m, deed)
        m.check()
    m.settle()
    m.assert_all_served_once_and_nothing_left()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_it_holds_in_long_stories_of_a_fleet_that_grows_and_shrinks(seed: int) -> None:
    chance = Random(seed)
    m = model(Sliders(1, 1, 128, 32), Policy(watermark=0.5, hysteresis=0.1, dwell=0.0), BLOCK)
    m.scheduler._dispatcher.fleet.least = chance.choice((1, 32))  # by the columns, or by asking everybody
    for deed in long_story(chance):
        if chance.random() < 0.1:
            more = chance.random() < (0.8 if len(m.chunks) < 12 else 0.2)
            play(m, ("add", chance.choice(list(Kind))) if more else ("remove", chance.randrange(12)))
            m.check()
        play(m, deed)
        m.check()
    m.settle()
    m.assert_all_served_once_and_nothing_left()


def long_story(chance: Random) -> Iterator[tuple[object, ...]]:
    """Three hundred deeds as likely as they are on a bad day; hypothesis alone prefers short stories."""
    deeds = (
        "arrive",
        "step",
        "cancel",
        "ask",
        "drain",
        "slide",
        "lose",
        "join",
        "silence",
        "despair",
        "stale",
    )
    for deed in chance.choices(deeds, (15, 70, 3, 4, 2, 2, 1, 0.6, 2, 0.2, 3.5), k=300):
        match deed:
            case "arrive":
                yield deed, chance.randint(1, 400), chance.randint(2, 60), chance.random() < 0.8
            case "step":
                yield deed, chance.randrange(4), chance.random() < 0.2, chance.random() < 0.15
            case "ask":
                yield deed, chance.randrange(40), chance.randrange(4)
            case "drain" | "silence":
                yield deed, chance.randrange(4), chance.random() < 0.5
            case "slide":
                yield deed, chance.randrange(4), chance.choice((0, 16, 64))
            case _:
                yield deed, chance.randrange(4 if deed in ("lose", "join") else 60)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), overload=st.sampled_from(OVERLOAD))
def test_the_same_holds_in_long_stories(seed: int, overload: str) -> None:
    policy = Policy(watermark=0.5, hysteresis=0.1, dwell=0.0, overload=overload)
    m = model(Sliders(2, 2, 128, 32), policy)
    for deed in long_story(Random(seed)):
        play(m, deed)
        m.check()
    m.settle()
    m.assert_all_served_once_and_nothing_left()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), fetch=st.booleans())
def test_the_same_holds_with_prefixes(seed: int, fetch: bool) -> None:
    policy = Policy(watermark=0.5, hysteresis=0.1, dwell=0.0, fetch=fetch)
    m = model(Sliders(2, 2, 128, 32), policy, BLOCK)
    for deed in long_story(Random(seed)):
        play(m, deed)
        m.check()
    m.settle()
    m.assert_all_served_once_and_nothing_left()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), overload=st.sampled_from((DEMOTE, REFUSE)), fair=st.booleans())
def test_the_same_holds_with_classes_and_what_they_forbid_never_happens(
    seed: int, overload: str, fair: bool
) -> None:
    never = {"kept": (Decline,), "sure": (Demote,), "both": (Decline, Demote)}
    classes = (
        SLOClass("kept", refuse=False),
        SLOClass("sure", demote=False, weight=3.0),
        SLOClass("both", refuse=False, demote=False),
        SLOClass("loose", ttft_slo=2.0, weight=0.5),
    )
    policy = Policy(watermark=0.5, hysteresis=0.1, dwell=0.0, overload=overload, classes=classes, fair=fair)
    m = model(Sliders(2, 2, 128, 32), policy)
    server = m.scheduler.slo
    m.terms = ((None, None), *((one.slo(server), one.name) for one in classes))
    for deed in long_story(Random(seed)):
        play(m, deed)
        m.check()
    m.settle()
    m.assert_all_served_once_and_nothing_left()
    names = [name for _, name in m.terms]
    for command in m.sent:
        if isinstance(command, SetChunk):
            continue
        of = names[int(command.request[1:]) % len(names)]
        assert not isinstance(command, never.get(of or "", ()))
        if isinstance(command, Prefill) and command.best_effort:
            assert of not in ("sure", "both")


@pytest.mark.parametrize(("overload", "sent"), [(DEMOTE, {Demote, Decline}), (REFUSE, {Decline})])
def test_some_are_demoted_and_some_turned_away_in_these_stories(
    overload: str, sent: set[type[Command]]
) -> None:
    policy = Policy(watermark=0.5, hysteresis=0.1, dwell=0.0, overload=overload)
    kinds: set[type[Command]] = set()
    for seed in range(30):
        m = model(Sliders(2, 2, 128, 32), policy)
        for deed in long_story(Random(seed)):
            play(m, deed)
        kinds |= {type(command) for command in m.sent}
    assert kinds >= sent


def test_prefixes_are_found_and_fetched_in_these_stories() -> None:
    m = model(Sliders(2, 2, 128, 32), Policy(watermark=0.5, hysteresis=0.1, dwell=0.0, fetch=True), BLOCK)
    for deed in long_story(Random(1)):
        play(m, deed)
    prefills = [c for c in m.sent if isinstance(c, Prefill)]
    assert sum(max(f.cached for f in c.forecasts) > 0 for c in prefills) > 10
    assert any(c.prefix_from for c in prefills)
    counted = m.scheduler.counters.prefixes.values()
    assert sum(c.actual for c in counted) > 0
    assert sum(c.predicted for c in counted) > 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_prefixes_that_nobody_is_told_of_change_no_decision(seed: int) -> None:
    stories = [model(Sliders(2, 2, 128, 32), Policy(dwell=0.0), size) for size in (0, BLOCK)]
    for m in stories:
        for deed in long_story(Random(seed)):
            if deed[0] == "arrive":  # without blocks, whatever the scheduler could do with them
                name, m.arrived = f"r{m.arrived}", m.arrived + 1
                m.work[name] = Work(name, deed[1], deed[2])
                m.tell(Arrived(m.now, name, deed[1], deed[2], deed[3]))
            else:
                play(m, deed)
    assert stories[0].sent == stories[1].sent


def test_every_kind_of_move_happens_in_these_stories() -> None:
    seen: set[Move] = set()
    for seed in range(30):
        m = model(Sliders(2, 2, 128, 32), Policy(watermark=0.5, hysteresis=0.1, dwell=0.0))
        for deed in long_story(Random(seed)):
            play(m, deed)
        seen |= {c.move for c in m.sent if isinstance(c, (Decode, Flow))}
    assert seen == set(Move)


@settings(max_examples=40, deadline=None)
@given(deeds=st.lists(st.one_of(REQUESTS, STEPS), min_size=30, max_size=80))
def test_aggregation_never_moves_a_request(deeds: list[tuple[object, ...]]) -> None:
    m = model(Sliders(0, 4, 0, 64), Policy(watermark=0.5, hysteresis=0.1, dwell=0.0))
    for deed in deeds:
        play(m, deed)
    m.settle()
    m.assert_all_served_once_and_nothing_left()
    assert all(isinstance(c, Prefill) and not c.hand_over for c in m.sent)


@settings(max_examples=40, deadline=None)
@given(deeds=st.lists(st.one_of(MOVABLE, GRANTED), min_size=30, max_size=80))
def test_disaggregation_prefills_on_p_heavy_only_and_hands_every_request_over_once(
    deeds: list[tuple[object, ...]],
) -> None:
    m = model(Sliders(2, 2, 512, 0), Policy(watermark=1.0, hysteresis=0.1, dwell=0.0))
    for deed in deeds:
        play(m, deed)
    m.settle()
    m.assert_all_served_once_and_nothing_left()
    kinds = {i.name: i.kind for i in m.scheduler.instances.values()}
    prefills = [c for c in m.sent if isinstance(c, Prefill)]
    assert all(c.hand_over and kinds[c.on] is Kind.P_HEAVY for c in prefills)
    decodes = [c for c in m.sent if isinstance(c, Decode)]
    assert all(c.move is Move.HAND_OVER and kinds[c.on] is Kind.D_HEAVY for c in decodes)
    assert sorted(c.request for c in decodes) == sorted(f"r{n}" for n in range(m.arrived))
    assert not any(isinstance(c, Flow) for c in m.sent)
