"""What the algorithms did, in numbers that metrics export, and the paper's reading of one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from taichi_serve.latency.predict import Average
from taichi_serve.messages import Abort, Command, Decline, Demote, Move, Outcome, Prefill

RECENT = 0.99  # weight of the past at each finished request: about the last hundred count
FREQUENT = 0.1  # backflows a request from which on the sliders are called wrong


@dataclass(slots=True)
class PrefixTokens:
    """Tokens of prompts that were not computed on one instance: as believed when they were placed there, and
    as the engine found when they were through."""

    predicted: int = 0
    actual: int = 0
    prompts: int = 0  # tokens of these prompts, cached or not


@dataclass(slots=True)
class Counters:
    """Moves that landed and that were refused, by kind; endings, by outcome; cached prompt tokens, by
    instance; and the recent backflow rate."""

    moves: dict[Move, int] = field(default_factory=lambda: dict.fromkeys(Move, 0))
    refused: dict[Move, int] = field(default_factory=lambda: dict.fromkeys(Move, 0))
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    best_effort: int = 0  # requests that could no longer meet their TTFT
    prefixes: dict[str, PrefixTokens] = field(default_factory=dict)
    recent: Average = field(default_factory=Average)

    def ended(self, outcome: Outcome, backflows: int) -> None:
        """A request is over after so many backflows."""
        self.outcomes[outcome] += 1
        self.recent.add(backflows, 1.0, RECENT)

    def decided(self, commands: Iterable[Command]) -> None:
        """Of these, count who is given up, turned away, or best effort."""
        for command in commands:
            if isinstance(command, Abort):
                self.ended(command.outcome, 0)
            elif isinstance(command, Decline):
                self.ended(Outcome.REFUSED, 0)
            elif isinstance(command, Demote) or (isinstance(command, Prefill) and command.best_effort):
                self.best_effort += 1

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
