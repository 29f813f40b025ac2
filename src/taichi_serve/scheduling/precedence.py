"""Overload: which classes of requests give way to which, by their weights.

A class falls short while one of its requests was lately turned away, or put off, for want of time. The
classes after it then leave room for its next request. A little room is enough for whoever has it, however
many others come (trunk reservation).

By weight alone the lowest weight comes last, and at the door before that all that may be refused, beside one
that may not. With fair shares it is the class that had most prompt tokens computed in time lately, each over
its weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from taichi_serve.classes import DEFAULT, SLOClass
from taichi_serve.latency.predict import Average
from taichi_serve.request import Request
from taichi_serve.scheduling.policy import Policy

KEEP = 0.99  # weight of the past at each prompt that is in time: about the last hundred count
LEVEL = math.log(1.05)  # who had less than 5 % more than another is at the same level, or at the next


@dataclass(slots=True)
class Standing:
    """A class, and how it fares: prompt tokens over its weight that were computed in time lately (the past
    fades), until when it falls short (s), and the mean length of the prompt that one of its tokens is of."""

    of: SLOClass
    had: float = 0.0
    short_until: float = -math.inf
    longer: Average = field(default_factory=Average)


class Precedence:
    """The classes of a server. Requests of no class, or of one that it does not know, are of `default`."""

    def __init__(self, policy: Policy) -> None:
        named = {one.name: one for one in policy.classes}
        named.setdefault(DEFAULT, SLOClass(DEFAULT))
        self._standings = {name: Standing(one) for name, one in named.items()}
        self._default = self._standings[DEFAULT]
        self.fair, self._patience = policy.fair, policy.patience
        self._refusable = all(one.refuse for one in named.values())
        self.demotable = all(one.demote for one in named.values())
        self.equal = not policy.fair and len({one.weight for one in named.values()}) == 1

    def rights(self, request: Request) -> SLOClass:
        """The class of a request: whether it may be refused, or demoted."""
        return self._of(request).of

    def place(self, request: Request) -> float:
        """The place of its class: of two the lower one gives way."""
        return 0.0 if self.equal else self._place(self._of(request))

    def came(self, request: Request) -> None:
        """A request is new."""
        length = float(request.prompt_tokens)
        self._of(request).longer.add(length * length, length, KEEP)

    def above(self, request: Request, now: float) -> list[Standing]:
        """Classes that fall short, and to which this request gives way at the door."""
        if self.equal and self._refusable:
            return []
        here = self._at_door(self._of(request))
        short = (one for one in self._standings.values() if one.short_until > now)
        return [one for one in short if here < self._at_door(one)]

    def taken(self, request: Request, tokens: int) -> None:
        """So many tokens of its prompt are going to be computed in time."""
        if self.fair:
            for one in self._standings.values():
                one.had *= KEEP
            here = self._of(request)
            here.had += tokens / here.of.weight

    def lost(self, request: Request, now: float, tokens: int = 0) -> None:
        """It was turned away, or put off; so many tokens had been taken for it. Its class falls short, unless
        it would be late on an idle server."""
        here = self._of(request)
        if request.work <= request.slo.ttft:
            here.short_until = max(here.short_until, now + self._patience * request.slo.ttft)
        here.had = max(0.0, here.had - tokens / here.of.weight)

    def _of(self, request: Request) -> Standing:
        return self._standings.get(request.slo_class or DEFAULT, self._default)

    def _at_door(self, one: Standing) -> tuple[bool, float]:
        return not (self.fair or one.of.refuse), self._place(one)

    def _place(self, one: Standing) -> float:
        return -math.floor(math.log(max(1.0, one.had)) / LEVEL) if self.fair else one.of.weight
