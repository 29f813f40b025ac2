"""What becomes of each request of a simulated run. For overload.py and overload_classes.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from taichi_serve.messages import Arrived, Command, Event, Finished, Outcome, Prefilled
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.slo import SLO, tpot


@dataclass(slots=True)
class Fate:
    """A request: when it came (s), its prompt tokens and class; its TTFT (s; None: no token), its TPOT (s;
    None: it was not served to its end), and whether it was refused."""

    at: float
    prompt: int
    slo_class: str | None = None
    ttft: float | None = None
    tpot: float | None = None
    refused: bool = False

    def good(self, slo: SLO) -> bool:
        """Whether it was served, within this SLO."""
        return self.ttft is not None and self.tpot is not None and slo.good(self.ttft, self.tpot)


@dataclass
class Watch:
    """Stands before a scheduler, and notes what becomes of every request."""

    inner: GlobalScheduler
    fates: dict[str, Fate] = field(default_factory=dict)

    def on(self, event: Event) -> Sequence[Command]:
        """Note it, and pass it on."""
        if isinstance(event, Arrived):
            self.fates.setdefault(event.request, Fate(event.at, event.prompt_tokens, event.slo_class))
        elif isinstance(event, Prefilled):
            fate = self.fates[event.request]
            fate.ttft = event.at - fate.at if fate.ttft is None else fate.ttft
        elif isinstance(event, Finished):
            fate = self.fates[event.request]
            fate.refused = event.outcome is Outcome.REFUSED
            if event.outcome is Outcome.FINISHED and fate.ttft is not None:
                fate.tpot = tpot(fate.at + fate.ttft, event.at, event.output_tokens)
        return self.inner.on(event)
