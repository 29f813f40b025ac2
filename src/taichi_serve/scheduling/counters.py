"""What the algorithms did, in numbers that metrics export, and the paper's reading of one of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from taichi_serve.latency.predict import Average
from taichi_serve.messages import Move, Outcome
from taichi_serve.request import Request
from taichi_serve.scheduling.verdict import judged

RECENT = 0.99  # weight of the past at each finished request: about the last hundred count
FREQUENT = 0.1  # backflows a request from which on the sliders are called wrong
UNCLASSED = "default"  # the class of a request that names none, in metrics


@dataclass(slots=True)
class PrefixTokens:
    """Tokens of prompts that were not computed on one instance: as believed when they were placed there, and
    as the engine found when they were through."""

    predicted: int = 0
    actual: int = 0
    prompts: int = 0  # tokens of these prompts, cached or not


@dataclass(slots=True)
class Kept:
    """How often an SLO was met, and how often it was not."""

    met: int = 0
    missed: int = 0

    def add(self, met: bool) -> None:
        """One more request."""
        self.met += met
        self.missed += not met


@dataclass(slots=True)
class Attained:
    """Requests of one class, judged by the SLO of each."""

    ttft: Kept = field(default_factory=Kept)
    tpot: Kept = field(default_factory=Kept)
    both: Kept = field(default_factory=Kept)

    def judge(self, request: Request, outcome: Outcome, now: float, output_tokens: int) -> None:
        """A request is over, with so many tokens out."""
        times = request.arrived_at, request.first_at, now
        verdict = judged(request.slo, outcome, *times, output_tokens)
        if verdict is None:
            return
        self.ttft.add(verdict.ttft)
        self.both.add(verdict.good)
        if verdict.tpot is not None:
            self.tpot.add(verdict.tpot)


@dataclass(slots=True)
class Counters:
    """Moves that landed and that were refused, by kind; endings, by outcome; SLOs met, by class; cached
    prompt tokens, by instance; and the recent backflow rate."""

    moves: dict[Move, int] = field(default_factory=lambda: dict.fromkeys(Move, 0))
    refused: dict[Move, int] = field(default_factory=lambda: dict.fromkeys(Move, 0))
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    best_effort: int = 0  # requests that could no longer meet their TTFT
    attained: dict[str, Attained] = field(default_factory=dict)
    prefixes: dict[str, PrefixTokens] = field(default_factory=dict)
    recent: Average = field(default_factory=Average)

    def ended(self, outcome: Outcome, backflows: int) -> None:
        """A request is over after so many backflows."""
        self.outcomes[outcome] += 1
        self.recent.add(backflows, 1.0, RECENT)

    def judge(self, request: Request, outcome: Outcome, now: float, output_tokens: int = 0) -> None:
        """A request is over, with so many tokens out."""
        attained = self.attained.setdefault(request.slo_class or UNCLASSED, Attained())
        attained.judge(request, outcome, now, output_tokens)

    def through(self, instance: str, prompt_tokens: int, predicted: int, actual: int) -> None:
        """A prompt is through on an instance, with so many tokens cached."""
        count = self.prefixes.setdefault(instance, PrefixTokens())
        count.predicted += predicted
        count.actual += actual
        count.prompts += prompt_tokens

    @property
    def backflow_rate(self) -> float:
        """Backflows a request over about the last hundred that ended."""
        return self.recent.value(0.0)

    @property
    def reading(self) -> str:
        """What the backflow rate says about the sliders (paper, section 4: frequent backflow)."""
        if self.backflow_rate < FREQUENT:
            return "ok"
        return "too few D-heavy instances: requests degraded for lack of KV come back for lack of TPOT"
