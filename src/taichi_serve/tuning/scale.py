"""How many instances of which kind the last minutes asked for. Only computed: nobody is added here.

Three things can be scarce, each a share of what all instances of a kind had in that time:

  prompts  of their time, that they were in steps with prompt tokens
  memory   of their KV up to the watermark, that was in use
  pace     of the TPOT SLO, that steps without prompts took, for the share of time that there were such

The highest of them is what is used of a kind. So many instances are wanted that `GOAL` of them would be used.
One less is wanted only where what is left would be used up to `CALM`, so that noise does not move the answer
up and down. Requests that miss their SLOs ask for one more of the kind that could have helped, if much of it
is used: an SLO that an idle server cannot keep is kept by no number of instances.

Whenever there are other instances than before, or other kinds of them, counting begins anew; for a while the
answer is what is there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from taichi_serve.instance import Instance
from taichi_serve.messages import Stepped
from taichi_serve.sliders import Kind

WINDOW = 300.0  # seconds that are looked back
FEWEST = 60.0  # seconds before which nothing else than what is there is wanted
PIECE = 10.0  # seconds that are summed up together
GOAL, CALM = 0.75, 0.6  # shares: at most so much is to be used, and at most so much after one left
MUCH = 0.4  # share from which on more instances can be what late requests lack
GOOD, JUDGED = 0.9, 20  # share of good requests below which more are wanted, of at least so many requests
FASTEST = 2  # at most so many times what is there


def working(instance: Instance) -> bool:
    """Whether it counts: one that is lost has no time that could be used, and one that is drained leaves."""
    return instance.alive and not instance.draining


@dataclass(slots=True)
class Use:
    """What was used of the instances of a kind: shares, 0 to 1 and beyond."""

    prompts: float = 0.0
    memory: float = 0.0
    pace: float = 0.0

    @property
    def most(self) -> tuple[float, str]:
        """The scarcest, and which it is."""
        return max((self.prompts, "prompts"), (self.memory, "memory"), (self.pace, "pace"))


@dataclass(slots=True)
class Piece:
    """Sums of the steps of some seconds, by kind."""

    began: float
    sums: dict[Kind, Use] = field(default_factory=lambda: {kind: Use() for kind in Kind})


class Load:
    """Sums up steps as they come, for `WINDOW` seconds."""

    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self._since: float | None = None  # when counting began

    def stepped(self, instance: Instance, step: Stepped, tpot: float, watermark: float) -> None:
        """A step is done; `instance` is as it is after it. `tpot` is the SLO in seconds."""
        if self._since is None:
            self._since = step.at
        if not self._pieces or step.at - self._pieces[-1].began >= PIECE:
            self._pieces.append(Piece(step.at))
            while step.at - self._pieces[0].began > WINDOW:
                self._pieces.popleft()
        sums = self._pieces[-1].sums[instance.kind]
        sums.memory += step.seconds * instance.kv_usage / watermark
        if step.prefill_tokens:
            sums.prompts += step.seconds
        elif step.decodes:
            sums.pace += step.seconds * step.seconds / tpot

    def begin(self, now: float) -> None:
        """Other instances are there now: what was seen before says nothing about these."""
        self._pieces.clear()
        self._since = now

    def seconds(self, now: float) -> float:
        """How long it has been counted, up to the window."""
        return 0.0 if self._since is None else min(WINDOW, max(0.0, now - self._since))

    def use(self, now: float, there: Mapping[Kind, int]) -> dict[Kind, Use]:
        """What was used of so many instances of each kind."""
        seconds = self.seconds(now)
        pieces = [piece for piece in self._pieces if now - piece.began <= WINDOW]
        found = {}
        for kind in Kind:
            whole = seconds * there.get(kind, 0)
            sums = [piece.sums[kind] for piece in pieces] if whole > 0 else []
            prompts, memory = sum(one.prompts for one in sums), sum(one.memory for one in sums)
            pace = sum(one.pace for one in sums)
            found[kind] = Use(*(x / whole if whole > 0 else 0.0 for x in (prompts, memory, pace)))
        return found


@dataclass(frozen=True, slots=True)
class Judged:
    """How many requests ended in the window, and the shares of them that kept both SLOs, TTFT and TPOT."""

    requests: int
    good: float = 1.0
    ttft: float = 1.0
    tpot: float = 1.0

    @property
    def bad(self) -> bool:
        """Whether too many were late."""
        return self.requests >= JUDGED and self.good < GOOD


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many instances of a kind, and why."""

    now: int
    wanted: int
    use: Use
    why: str


def wanted(there: Mapping[Kind, int], use: Mapping[Kind, Use], judged: Judged) -> dict[Kind, Wanted]:
    """By the rule above, for each kind; of a kind that is not there none is wanted, unless it is lacking."""
    lacking = _lacking(there, use, judged)
    return {kind: _of_kind(there.get(kind, 0), use[kind], judged, kind is lacking) for kind in Kind}


def _lacking(there: Mapping[Kind, int], use: Mapping[Kind, Use], judged: Judged) -> Kind | None:
    """The kind of which one more could have helped those who were late."""
    if not judged.bad:
        return None
    first, other = (
        (Kind.P_HEAVY, Kind.D_HEAVY) if judged.ttft <= judged.tpot else (Kind.D_HEAVY, Kind.P_HEAVY)
    )
    kind = first if there.get(first, 0) else other
    return kind if use[kind].most[0] >= MUCH else None


def _of_kind(now: int, use: Use, judged: Judged, lacking: bool) -> Wanted:
    most, what = use.most
    said = f"{what} {most:.0%}"
    up = min(FASTEST * now, math.ceil(round(now * most / GOAL, 9)))
    if up > now:
        return Wanted(now, up, use, f"{said} used, and at most {GOAL:.0%} should be")
    if lacking:
        return Wanted(now, now + 1, use, f"{said} used, and only {judged.good:.0%} of requests are good")
    if now > 1 and not judged.bad and round(now * most - CALM * (now - 1), 9) <= 0:
        return Wanted(now, now - 1, use, f"{said} used: one less would have at most {CALM:.0%}")
    return Wanted(now, now, use, f"{said} used" if now else "none is there")
