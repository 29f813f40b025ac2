"""The slow loop: which setting would have served the last requests best, and what it would gain.

A hill climb from the setting in force. All rehearse the same requests, faster and faster for as long as some
of them hold: what is wanted is the setting that holds the highest load, not one of many that hold this one.
It is a pure function: the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from taichi_serve.scheduling.policy import Policy
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.rehearsal import Past, Plant, Standing, rehearse
from taichi_serve.tuning.setting import UNIT, Setting, largest

TTFT_MARGINS = (0.3, 0.5, 0.75, 1.0)
TPOT_MARGINS = (0.65, 0.8, 1.0)
FILLED = (0.85, 1.0)  # shares of the TPOT SLO that a step with a chunk may take, to begin with
ALIKE = (256, 512, 1024)  # chunks to try where no instance would be P-heavy
LOADS = (1.0, 1.1, 1.21, 1.33, 1.46, 1.61, 1.95)  # times the rate seen, until the setting in force fails
FASTER = 1.04
HEATS = 6  # so often at most the best go on at a higher load
STEPS = 2  # of the climb
FIRST_HEAT, KEPT = 0.4, 6  # share of a whole rehearsal that many have first, and how many of them go on
LEAD, LEAD_USED = 0.03, 0.05  # in good requests, or of the scarcer SLO, for another setting to be proposed
KIND_FACTOR = 1.5  # times as much for another R_PD
SECONDS, LIVES = 90.0, 4.0  # of traffic that a rehearsal has, the second in mean answers
FEWEST, MOST = 300, 1500  # requests of a rehearsal
# Facts of all rehearsals together: 8 to 14 us of processor time each. A question that is asked while requests
# queue up has more of them than any other, and is the one that must not go without an answer.
BUDGET = 2_000_000


@dataclass(frozen=True, slots=True)
class Question:
    """All that a proposal depends on. `life` is how long a request takes, in seconds on average."""

    plant: Plant
    past: Past
    slo: SLO
    policy: Policy
    now: Setting
    life: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """A setting, and how it stands beside the one in force (`now`) at `load` times the rate that was seen. It
    may be the one in force: then nothing better was found."""

    setting: Setting
    now: Standing
    then: Standing
    load: float
    runs: int  # rehearsals that this took

    @property
    def gain(self) -> float:
        """The share of all requests by which more would be good."""
        return self.then.good - self.now.good

    @property
    def why(self) -> str:
        """In words."""
        now, then = self.now, self.then
        return (
            f"at {self.load:.2f} times their rate {then.good:.0%} of the last requests would be good, not "
            f"{now.good:.0%}, with P90 at {then.used:.0%} of the scarcer SLO, not {now.used:.0%}"
        )


class SpentError(Exception):
    """The budget of a climb is spent."""


@dataclass(slots=True)
class Climb:
    """A hill climb under way; every rehearsal is kept. `best` is the best setting by what is known so far."""

    question: Question
    best: Setting
    load: float = 1.0
    left: int = BUDGET  # facts
    seen: dict[tuple[Setting, float, int], Standing] = field(default_factory=dict)

    def at(self, setting: Setting, share: float = 1.0, load: float | None = None) -> Standing:
        """How it stands at a load, or at that of now, by a whole rehearsal or the first `share` of one.
        Raises SpentError where that is not known yet and nothing is left of the budget."""
        asked, load = self.question, self.load if load is None else load
        count = round(self._count(load) * share)
        key = setting, load, count
        if key not in self.seen:
            if self.left <= 0:
                raise SpentError
            seen = rehearse(asked.plant, asked.past, asked.slo, asked.policy, setting, load, count)
            self.seen[key] = seen
            self.left -= seen.facts
        return self.seen[key]

    def climb(self) -> None:
        """A few steps uphill, or fewer if the budget is spent before."""
        asked, most = self.question, self.question.plant.limits.max_chunk
        try:
            self.begin()
            self.race(asked.now, far(asked))
            for _ in range(STEPS):
                last = self.best
                self.race(last, near(last, most))
                if self.best == last:
                    return
        except SpentError:
            return

    def whole(self, setting: Setting) -> Standing:
        """How it stands at the load of now, whatever is left of the budget."""
        self.left = max(self.left, 1)
        return self.at(setting)

    def _count(self, load: float) -> int:
        asked = self.question
        seconds = max(SECONDS, LIVES * asked.life)
        return max(FEWEST, min(MOST, round(asked.past.rate * load * seconds)))

    def begin(self) -> None:
        """Find a load that the setting in force just holds, or that of now where it does not hold that."""
        for load in LOADS:
            if not self.at(self.question.now, load=load).held:
                return
            self.load = load

    def race(self, first: Setting, others: Iterable[Setting]) -> None:
        """Find the best: of many others a few go on from short rehearsals to whole ones, and those that hold
        the load go on at a higher one. Beyond what anybody holds nothing is compared: there a setting that
        fails some requests at any load looks better than one that holds, and then fails all."""
        field_ = [one for one in dict.fromkeys(others) if one != first]
        field_.sort(key=lambda one: self.at(one, FIRST_HEAT).key, reverse=True)
        field_ = self._ranked([first, *field_[:KEPT]])
        for _ in range(HEATS):
            load = self.load * FASTER
            held = [one for one in field_ if self.at(one).held and self.at(one, load=load).held]
            if not held:
                break
            self.load, field_ = load, self._ranked(held, load)
        self._ranked(field_)

    def _ranked(self, settings: Iterable[Setting], load: float | None = None) -> list[Setting]:
        ranked = sorted(settings, key=lambda one: self.at(one, load=load).key, reverse=True)
        self.best = ranked[0]
        return ranked


def propose(question: Question, budget: int = BUDGET) -> Proposal:
    """The best setting that a climb of a few steps finds with so many facts."""
    question = replace(question, plant=question.plant.fitted())
    now = question.now
    climb = Climb(question, now, left=budget)
    climb.climb()
    best = climb.best
    ours, theirs = climb.whole(now), climb.whole(best)
    if not _worth(now, ours, best, theirs):
        best, theirs = now, ours
    return Proposal(best, ours, theirs, climb.load, len(climb.seen))


def _worth(now: Setting, ours: Standing, best: Setting, theirs: Standing) -> bool:
    """Whether it is so much better that a change pays: in good requests, or where both hold in what is left
    of the scarcer SLO."""
    factor = 1.0 if best.sliders.p_heavy == now.sliders.p_heavy else KIND_FACTOR
    if ours.held:
        return theirs.held and ours.used - theirs.used > factor * LEAD_USED
    return theirs.good - ours.good > factor * LEAD


def far(asked: Question) -> Iterator[Setting]:
    """Settings that differ from the one in force in R_PD and S_D together, for one asks for the other: with
    fewer D-heavy instances each has more decodes, which leave less time for prompts beside them; and in one
    other thing."""
    now, most = asked.now, asked.plant.limits.max_chunk
    p_heavy, instances = now.sliders.p_heavy, now.sliders.instances
    for count in range(max(1, p_heavy - 2), min(instances - 1, p_heavy + 2) + 1):
        split = now.with_p_heavy(count, most)
        yield from (split.with_d_chunk(chunk, most) for chunk in fitting(asked, instances - count))
        yield from _chunks(split, most, (1.0, 0.67) if count != p_heavy else (0.5, 0.75, 1.5, 2.0))
    if p_heavy <= 2:
        # Where all are alike, what suits them may be far from every chunk beside P-heavy ones.
        for chunk in (chunk for chunk in (*fitting(asked, instances), *ALIKE) if UNIT <= chunk <= most):
            yield Setting(Sliders(0, instances, now.sliders.p_chunk, chunk), 1.0, now.tpot_margin)
    yield from _margins(now)
    if p_heavy:
        yield from _p_chunks(now, most)


def fitting(asked: Question, d_heavy: int) -> Iterator[int]:
    """Chunks with which a step of one of so many D-heavy instances takes what TPOT allows, beside the decodes
    that it has on average if all requests decode there; a climb alone would not find these from afar."""
    calls = asked.past.calls
    tpot = min((call.slo or asked.slo).tpot for call in calls)
    prompt = sum(call.prompt_tokens for call in calls) / len(calls)
    output = sum(call.output_tokens for call in calls) / len(calls)
    decodes = min(asked.past.rate * output * tpot / d_heavy, float(asked.plant.limits.max_running))
    context = decodes * (prompt + output / 2)
    truth = asked.plant.kind(Kind.D_HEAVY)

    def seconds(chunk: int) -> float:
        return truth.of(chunk, chunk * prompt / 2, decodes, context)

    for share in FILLED:
        yield largest(seconds, share * tpot, asked.plant.limits.max_chunk)


def near(now: Setting, most: int) -> Iterator[Setting]:
    """Settings that differ a little from this one."""
    p_heavy = now.sliders.p_heavy
    for more, ratio in ((-1, 1.0), (-1, 1.5), (1, 1.0), (1, 0.67)):
        if 1 <= p_heavy + more < now.sliders.instances:
            yield from _chunks(now.with_p_heavy(p_heavy + more, most), most, (ratio,))
    yield from _chunks(now, most, (0.75, 0.85, 1.2, 1.5))
    yield from _margins(now)


def _chunks(now: Setting, most: int, ratios: Iterable[float]) -> Iterator[Setting]:
    chunk = now.sliders.d_chunk
    wanted = [chunk * ratio for ratio in ratios] if chunk else [2 * UNIT, 4 * UNIT, 8 * UNIT]
    if UNIT <= chunk <= 4 * UNIT and now.sliders.p_heavy:
        wanted.append(0)
    yield from (now.with_d_chunk(tokens, most) for tokens in wanted)


def _margins(now: Setting) -> Iterator[Setting]:
    if now.sliders.d_chunk and now.sliders.p_heavy:  # else there is nothing to choose between
        yield from (replace(now, ttft_margin=m) for m in TTFT_MARGINS if m != now.ttft_margin)
        yield from (replace(now, tpot_margin=m) for m in TPOT_MARGINS if m != now.tpot_margin)


def _p_chunks(now: Setting, most: int) -> Iterator[Setting]:
    sliders = now.sliders
    for p_chunk in (sliders.p_chunk // 2, sliders.p_chunk * 2):
        if max(UNIT, sliders.d_chunk) <= p_chunk <= most:
            yield replace(now, sliders=replace(sliders, p_chunk=p_chunk))
