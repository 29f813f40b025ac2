"""The TTFT SLO at which aggregation and disaggregation are level: where only what lies between can be ahead.

Fewer instances prefill in disaggregation, so its prompts wait longer, and how long they may wait is what
parts the two: with a tight TTFT aggregation keeps more requests, with a loose one that lead is gone. For a
given TPOT SLO there is a tightest TTFT SLO at which disaggregation, tuned, is as good as aggregation, tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from taichi_serve.latency.model import prompt_attention
from taichi_serve.search.effort import Effort
from taichi_serve.search.goodput import Scene
from taichi_serve.search.sliders import Tell, best, search
from taichi_serve.slo import SLO

BASELINES = ("aggregation", "disaggregation")
LEAST, MOST = 4.0, 128.0  # the TTFT SLO lies between these, in times that the mean prompt takes alone
NEAR = 1.05  # and found to this ratio
LEVEL = 0.97  # of aggregation's goodput: differences below 3 % are within the error of step times
ROUGH = Effort(seconds=120.0, least=800, most=2000, tuners=(2, 2), judging=0)


@dataclass(frozen=True)
class Balance:
    """A TTFT SLO (s), and the goodput (requests/s) of either baseline there."""

    ttft: float
    aggregation: float
    disaggregation: float

    @property
    def level(self) -> bool:
        """Whether disaggregation is as good as aggregation."""
        return self.disaggregation >= LEVEL * self.aggregation


def balance(
    scene: Scene,
    instances: int,
    seed: int = 0,
    effort: Effort = ROUGH,
    processes: int | None = None,
    tell: Tell = lambda _: None,
) -> Balance:
    """Where they become level, by bisection; raises ValueError where that is nowhere in reach."""

    def at(ttft: float) -> Balance:
        tell(f"balance: TTFT SLO {ttft:.3g} s")
        tried = replace(scene, slo=SLO(ttft, scene.slo.tpot))
        firsts = best(search(tried, instances, seed, BASELINES, effort, processes))
        return Balance(ttft, *(firsts[name].rate for name in BASELINES))

    low, high = LEAST * alone(scene), MOST * alone(scene)
    for end, wanted, ahead in ((low, False, "disaggregation"), (high, True, "aggregation")):
        if at(end).level is not wanted:
            raise ValueError(f"no TTFT SLO is balanced: at {end:.2g} s {ahead} is ahead")
    while high > low * NEAR:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if at(middle).level else (middle, high)
    return at(float(f"{high:.2g}"))  # an SLO that people can say


def alone(scene: Scene) -> float:
    """Seconds that a prompt of the mean length takes on an idle instance, in one step."""
    prompt = round(scene.workload.means()[0])
    return scene.machine.truth.of(prompt, float(prompt_attention(prompt)), 0, 0)
