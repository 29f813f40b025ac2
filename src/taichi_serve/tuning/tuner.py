"""Sliders that set themselves: a scheduler around the scheduler, with the same decisions and some more.

It sees every fact on its way. Every few seconds it looks back, and where a change is due it makes a `Tuned`
of it, which goes to the scheduler, and into the log, like any other fact: who replays the log needs no tuner.
The fast loop (nudge.py) answers here and at once; the slow one (proposal.py) is asked, and answers when it
can. Nothing here reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from taichi_serve.cluster.base import Scheduler
from taichi_serve.messages import (
    Added,
    Arrived,
    Command,
    Event,
    Finished,
    Prefilled,
    Promised,
    Removed,
    Slid,
    Stepped,
    Tuned,
)
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind
from taichi_serve.tuning.adviser import Adviser
from taichi_serve.tuning.beliefs import Beliefs
from taichi_serve.tuning.nudge import ENOUGH, harmed, nudge
from taichi_serve.tuning.past import Sort, life_of, past_of, quiet, stretch
from taichi_serve.tuning.proposal import Proposal, Question
from taichi_serve.tuning.rehearsal import Limits
from taichi_serve.tuning.serving import calm, made
from taichi_serve.tuning.setting import Setting
from taichi_serve.tuning.steps import Done, Steps
from taichi_serve.tuning.watch import View, Watch

LOOK = 5.0  # seconds between two looks back
WINDOW = 60.0  # seconds that a look goes back at most
HURRY, STEADY = 5.0, 30.0  # seconds between two changes of chunks: while requests are bad, and while good
KIND_HURRY, KIND_STEADY = 15.0, 60.0  # the same for an instance that changes its kind
SETTLED = 10.0  # seconds beside the TTFT SLO after a change before the fast loop judges what it did
GOOD = 0.9  # share of good requests from which on it is steady
FIRST, FIRST_REQUESTS = 15.0, 60  # seconds and requests after which the slow loop is asked first
SOON, LATER = 30.0, 60.0  # seconds to the next question: after a change of sorts, and while it goes on
REST = 10.0  # times what an answer took passes until the next question: rehearsals take a tenth of a core
PATIENCE = 300.0  # seconds that an answer is waited for
CONTENT = 120.0  # the same while nothing better was found and requests are good
REMEMBERED, AT_MOST = 240.0, 2000  # seconds and requests that a question is about
RECENT, RECENT_REQUESTS = 20.0, 30  # seconds and requests by which another sort is found
HELPED = 0.97  # of what was used of the short SLO before a nudge is used after it: then it helped
CALM, KIND_GAIN = 0.95, 0.2  # where so many are good, another R_PD must promise at least so much more
KEPT = 200  # changes that are remembered
TOLD = (Slid, Promised, Added, Removed)
Look = Callable[[float], Tuned | None]


class Tuner:
    """Watches, and moves the sliders; or says where it would move them."""

    def __init__(
        self,
        inner: Scheduler,
        core: GlobalScheduler,
        limits: Limits,
        adviser: Adviser | None = None,
        act: bool = True,
        guard: Callable[[Look], Look] = lambda look: look,
    ) -> None:
        """`inner` gets every fact: `core`, or what stands around it. Without an adviser there is the fast
        loop alone. Where it is not to `act` it makes suggestions. `guard` may keep what goes wrong in a look
        from whoever is served: then nothing is changed."""
        self.inner = inner
        self.core = core
        self.adviser = adviser
        self.act = act
        self._look = guard(self._looked)
        self.watch = Watch()
        self.beliefs = Beliefs(limits, core.predictor)
        self.changes: deque[Tuned] = deque(maxlen=KEPT)
        self.made = self.suggested = 0
        self.view: View | None = None  # of the last look
        self.done = Done()  # by D-heavy instances since the look before it
        self.proposal: Proposal | None = None  # the last one
        self._steps = Steps()
        self._made = partial(made, core)
        # Whether the last nudge was up, and what it was to mend.
        self._nudged: tuple[bool, float] | None = None
        self._before: tuple[Setting, float] | None = None  # before the last nudge: this, and so many good
        self._target: Setting | None = None  # where the slow loop wants to be
        self._on_way = False  # whether an instance has turned towards it
        self._gain: float | None = None
        self._sort: Sort | None = None  # of the requests that were last asked about
        self._look_at = self._ask_at = float("-inf")
        # What was before these is of no interest: to the slow loop, and to the fast one.
        self._cut = self._since = float("-inf")
        self._asked_at = self._rest_until = float("-inf")
        self._steady = True  # most requests are good
        self._asked_of: Setting | None = None  # the setting in force when the last question was asked
        self._open = False  # whether a question is
        self._chunk_at = self._kind_at = float("-inf")  # when these last changed

    @property
    def now(self) -> Setting:
        """The setting in force."""
        return Setting.of(self.core.sliders, self.core.policy)

    def on(self, event: Event) -> Sequence[Command]:
        """Pass the fact on; then, if it is time, look back."""
        kind = type(event)
        if kind is Stepped:
            assert isinstance(event, Stepped)
            instance = self.core.instances.get(event.instance)
            if instance is not None:
                self.beliefs.stepped(instance, event)
            if instance is not None and event.decodes and instance.kind is Kind.D_HEAVY:
                self._steps.add(event)
        elif kind is Arrived or kind is Prefilled or kind is Finished:
            self.watch.on(event)
        elif kind in TOLD:
            self._told(event.at)
        commands = self.inner.on(event)
        if event.at < self._look_at:
            return commands
        self._look_at = event.at + LOOK
        tuned = self._look(event.at)
        return commands if tuned is None else [*commands, *self.inner.on(tuned)]

    def _told(self, at: float) -> None:
        """An operator changed something, or there are other instances: what was seen before says little, and
        what was proposed nothing."""
        self._since, self._target, self._before = at, None, None
        self._ask_anew(at + LOOK)

    def _ask_anew(self, at: float) -> None:
        """What is being answered is out of date: ask again then."""
        self._ask_at = min(self._ask_at, at)
        self._open, self._asked_at = False, float("-inf")

    # ------------------------------------------------------------------------------------- looking back

    def _looked(self, now: float) -> Tuned | None:
        if not calm(self.core):
            self._since, self._target = now, None
            return None
        since = max(self._since, now - WINDOW)
        self._seen(self.watch.view(now, self.core.slo, since, self._made))
        strictest = self.core.ledger.strictest.slo or self.core.slo
        self.done = self._steps.done(strictest.tpot)
        self._advised(now)
        if self._target is not None:
            return self._approach(now, self._target)
        return self._nudge(now)

    def _seen(self, view: View) -> None:
        """Of a few requests those that are late are known first: they say nothing about all."""
        self.view = view
        if view.judged >= ENOUGH:
            self._steady = view.good >= GOOD

    # ------------------------------------------------------------------------------------ the slow loop

    def _advised(self, now: float) -> None:
        """Hear what the slow loop found, and ask it again if it is time."""
        if self.adviser is None:
            return
        proposal = self.adviser.answer(now)
        if proposal is not None:
            self.proposal, self._open = proposal, False
            self._rest_until = now + REST * self.adviser.took
        if proposal is not None and self._asked_of != self.now:  # an answer to a question of the past
            self._ask_anew(now)
        elif proposal is not None:
            better = proposal.setting != self.now and not self._too_little(proposal)
            self._target, self._gain = (proposal.setting, proposal.gain) if better else (None, None)
            self._on_way = False
            if not better and self._steady:
                self._ask_at = now + CONTENT
        if self._quiet(now):
            return
        recent = list(self.watch.since(now - RECENT))[::-1]
        known = self._sort
        span = max(1.0, now - recent[0].at) if recent else RECENT
        if known and len(recent) >= RECENT_REQUESTS and Sort.of(recent, span).differs(known):
            self._cut, self._sort = now - RECENT, None
            self._ask_anew(now)
        if not self._steady:
            self._ask_at = min(self._ask_at, now + LATER)
        gap = PATIENCE if self._open else SOON
        if now >= max(self._ask_at, self._rest_until) and now - self._asked_at >= gap:
            self._ask(now, self.adviser)

    def _quiet(self, now: float) -> bool:
        """Whether nobody comes: what is seen of a load that has ended is how it ended."""
        return quiet(list(islice(self.watch.since(float("-inf")), RECENT_REQUESTS))[::-1], now)

    def _too_little(self, proposal: Proposal) -> bool:
        """Whether requests are good as it is, and another R_PD promises little beyond: turning an instance
        costs those that are on it."""
        calm = self.view is not None and self.view.good >= CALM
        same = proposal.setting.sliders.p_heavy == self.core.sliders.p_heavy
        return calm and not same and proposal.gain < KIND_GAIN

    def _ask(self, now: float, adviser: Adviser) -> None:
        last = list(islice(self.watch.since(max(self._cut, now - REMEMBERED)), AT_MOST))
        seen, end = stretch(last[::-1], now, FIRST, FIRST_REQUESTS)
        plant = self.beliefs.plant({i.name: i.kind for i in self.core.instances.values()})
        if plant is None or len(seen) < FIRST_REQUESTS or end - seen[0].at < FIRST:
            return
        past = past_of(seen, end, plant.limit, self._made)
        if past is None:
            return
        self._ask_at = now + (SOON if self._sort is None else LATER)
        self._sort, self._open, self._asked_at = Sort.of(seen, past.span), True, now
        self._asked_of = self.now
        policy = replace(self.core.policy, ahead=False)
        adviser.ask(now, Question(plant, past, self.core.slo, policy, self.now, life_of(seen)))

    def _approach(self, now: float, target: Setting) -> Tuned | None:
        """Go to where the slow loop wants to be, one instance at a time."""
        here = self.now
        if now - self._chunk_at < (STEADY if self._steady else HURRY):
            return None
        there, self._nudged = target, None
        if target.sliders.p_heavy != here.sliders.p_heavy:
            if now - self._kind_at < (KIND_STEADY if self._steady else KIND_HURRY):
                return None
            if self._on_way and self._steady:
                # Half way was enough, and what is seen here was not known when the target was found.
                self._target = None
                self._ask_anew(now)
                return None
            there = here.towards(target, self.beliefs.limits.max_chunk)
        self._on_way = True
        if there == target:
            self._target = None
        why = self.proposal.why if self.proposal else ""
        return self._change(now, there, why, self._gain)

    # ------------------------------------------------------------------------------------ the fast loop

    def _waits(self, now: float) -> bool:
        """Whether it is too early for a nudge: for another one, or to see what the last change did."""
        if now - self._chunk_at < (STEADY if self._steady else HURRY):
            return True
        if now - self._since < SETTLED + self.core.slo.ttft:
            return True
        # While nothing is urgent, and the slow loop has said nothing: a cluster that was empty shows too
        # little TTFT.
        return self._steady and self.adviser is not None and self.proposal is None

    def _nudge(self, now: float) -> Tuned | None:
        assert self.view is not None
        if self._waits(now) or self._quiet(now):
            return None
        if self._before is not None and harmed(self.view, self._before[1]):
            return self._back(now, *self._before)
        found = nudge(self.view, self.done, self.now, self.beliefs.limits.max_chunk)
        if found is None:
            return None
        up = found[0].sliders.d_chunk > self.now.sliders.d_chunk
        used = self.view.ttft if up else self.view.tpot
        before, self._nudged = self._nudged, (up, used)
        if before is not None and before[0] is up and used > HELPED * before[1]:
            self._ask_at = min(self._ask_at, now)  # the last step did not help: no chunk will
            return None
        before_ = self.now, self.view.good
        tuned = self._change(now, *found, None)
        self._before = before_
        return tuned

    def _back(self, now: float, before: Setting, good: float) -> Tuned | None:
        """Take the last step back; that way it is not gone again before the slow loop was heard."""
        assert self.view is not None
        self._nudged = before.sliders.d_chunk < self.now.sliders.d_chunk, 0.0
        self._ask_at = min(self._ask_at, now)
        why = f"back, for {self.view.good:.0%} are good since, not {good:.0%}"
        return self._change(now, replace(self.now, sliders=before.sliders), why, None)

    def _change(self, now: float, there: Setting, why: str, gain: float | None) -> Tuned | None:
        here = self.now
        last = self.changes[-1] if self.changes else None
        said = f"{here.difference(there)}: {why}"
        tuned = Tuned(now, there.sliders, there.ttft_margin, there.tpot_margin, said, gain, self.act)
        self._since, self._before = now, None
        if here.sliders.p_heavy != there.sliders.p_heavy:
            self._kind_at = now
        if (here.sliders.p_chunk, here.sliders.d_chunk) != (there.sliders.p_chunk, there.sliders.d_chunk):
            self._chunk_at = now
        if not self.act and last is not None and replace(last, at=now, why=said, gain=gain) == tuned:
            return None  # said already
        self.made, self.suggested = self.made + self.act, self.suggested + (not self.act)
        self.changes.append(tuned)
        return tuned
