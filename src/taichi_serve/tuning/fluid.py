"""How many requests/s sliders carry, as if prompts and decodes were a fluid: no queues, no chance.

It is for the choice before anything was seen of a workload (start.py), and takes no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.model import Roofline, prompt_attention
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.setting import UNIT

BUSY = 0.8  # of the time in which instances may prefill: the rest is for the queue to get shorter
FILLED = 0.9  # of the SLOs that the mean step, or a prompt in small chunks, may take
FINER = 1.19  # from one chunk, or number of decodes, to the next one that is looked at


@dataclass(frozen=True, slots=True)
class Load:
    """A kind of workload: tokens of the mean prompt and answer."""

    prompt: int
    output: int


CHAT, SUMMARIES = Load(661, 257), Load(3658, 100)  # both kinds of the paper (section 6)


@dataclass(frozen=True, slots=True)
class Fluid:
    """Instances that are all alike: what a step takes, the decodes it may have, and the tokens of KV for
    which there is room."""

    steps: StepCurve | Roofline
    slo: SLO
    seqs: int
    room: float

    def suited(
        self, instances: int, p_chunk: int, loads: tuple[Load, ...] = (CHAT, SUMMARIES)
    ) -> Sliders | None:
        """The sliders that come nearest to the best ones of each load, judged by the load for which they are
        worse; None where no sliders carry all of them."""
        every = list(sliders(instances, p_chunk))
        carried = [[self.carried(one, load) for load in loads] for one in every]
        best = [max(column) for column in zip(*carried, strict=True)]
        if not all(best):
            return None
        shares = [min(rate / most for rate, most in zip(row, best, strict=True)) for row in carried]
        return every[shares.index(max(shares))]

    def carried(self, sliders: Sliders, load: Load) -> float:
        """Requests/s that these sliders carry; 0 where a step with one decode is too long."""
        context = load.prompt + load.output / 2
        alone = self._prefilled(sliders.p_chunk, load.prompt) if sliders.p_heavy else math.inf
        # A prompt that is late with nobody before it is no use, however many of them are through.
        apart = sliders.p_heavy * BUSY / alone if alone <= FILLED * self.slo.ttft else 0.0
        return max(self._beside(decodes, sliders, load, apart) for decodes in self._counts(context))

    def _beside(self, decodes: int, sliders: Sliders, load: Load, apart: float) -> float:
        """The same with so many decodes in each step, and `apart` prompts/s prefilled by P-heavy instances.
        Prompt tokens are in that share of steps in which there are as many prompts/s as answers."""
        chunk, context = sliders.d_chunk, load.prompt + load.output / 2
        full = self.steps.of(chunk, chunk * context / 2, decodes, decodes * context)
        bare = self.steps.of(0, 0.0, decodes, decodes * context)
        limit = FILLED * self.slo.tpot
        if full > self.slo.tpot or bare > limit:
            return 0.0
        if not apart and full * math.ceil(load.prompt / chunk) > FILLED * self.slo.ttft:
            return 0.0
        answers, prompts = sliders.d_heavy * decodes / load.output, sliders.d_heavy * chunk / load.prompt
        more = full - bare
        share = (answers - apart * bare) / (apart * more + prompts)
        share = max(0.0, min(share, BUSY, (limit - bare) / more if more > 0.0 else BUSY))
        step = bare + share * more
        return min(apart + share * prompts / step, answers / step)

    def _prefilled(self, chunk: int, prompt: int) -> float:
        """Seconds that a P-heavy instance takes for a prompt alone."""
        parts = math.ceil(prompt / chunk)
        return parts * self.steps.of(prompt / parts, prompt_attention(prompt) / parts, 0, 0)

    def _counts(self, context: float) -> Iterator[int]:
        """Decodes of a step, up to as many as there is room for."""
        most, count = max(1, int(min(self.seqs, self.room / context))), 1
        while count < most:
            yield count
            count = max(count + 1, int(count * FINER))
        yield most


def sliders(instances: int, p_chunk: int) -> Iterator[Sliders]:
    """All kinds of instances, with small chunks that grow by a fifth up to the large one."""
    for p_heavy in range(instances):
        chunk = UNIT
        while chunk < p_chunk:
            yield Sliders(p_heavy, instances - p_heavy, p_chunk, chunk)
            chunk = max(chunk + UNIT, int(chunk * FINER) // UNIT * UNIT)
        yield Sliders(p_heavy, instances - p_heavy, p_chunk, p_chunk)
