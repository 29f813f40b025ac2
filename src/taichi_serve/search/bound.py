"""A rate that no scheduler can pass, from conservation of work under the TPOT limit (docs/bound.md derives
it).

Every step k takes s(n, p) seconds for n decodes that must keep their TPOT and p other tokens. Per request
there are O decode tokens of the first sort and P of the other, so with x_k steps of each sort per request

    minimise sum x_k s_k   with   sum x_k n_k = O,   sum x_k p_k = P,   sum x_k n_k (s_k - tau) <= 0.

That is a linear programme; any (u, v, w >= 0) with u n_k + v p_k <= s_k + w n_k (s_k - tau) for all k proves
that it costs at least u O + v P seconds, and the largest such value is the optimum. TTFT is ignored, and so
is all waste.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from taichi_serve.bench.sharing import seen
from taichi_serve.bench.workload import Workload
from taichi_serve.latency.curve import StepCurve
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.shipped import Machine

Vector = npt.NDArray[np.float64]
BAD_SHARE = 0.1  # of requests whose TPOT does not count


@dataclass(frozen=True)
class Mean:
    """A workload's mean request, in the terms that step time is linear in."""

    prompt: float  # tokens of it that must be computed
    attention: float  # pairs of these
    held: float  # decode tokens of those that keep their TPOT: the shortest 90 % of outputs
    free: float  # decode tokens of the others
    context: float  # mean context of a decode token

    @classmethod
    def of(cls, workload: Workload, draws: int = 8000) -> Mean:
        """From the first requests of the workload's seed 0; of a prompt only what no prompt or answer before
        it had: nobody can have cached more."""
        calls = list(seen(workload.calls(1.0, draws, 0), workload.block_size))
        prompts = np.array([c.call.prompt_tokens for c in calls], dtype=np.float64)
        cached = np.array([c.tokens for c in calls], dtype=np.float64)
        outputs = np.array([c.call.output_tokens - 1 for c in calls], dtype=np.float64)
        read = outputs * prompts + outputs * (outputs + 1) / 2
        kept = np.sort(outputs)[: round((1 - BAD_SHARE) * draws)]
        attention = float(((prompts * (prompts + 1) - cached * (cached + 1)) / 2).mean())
        context = float(read.sum() / max(1.0, outputs.sum()))
        held = float(kept.sum() / draws)
        return cls(float((prompts - cached).mean()), attention, held, float(outputs.mean()) - held, context)


def bound(machine: Machine, workload: Workload, tpot: float, instances: int, max_running: int = 256) -> float:
    """Requests/s that `instances` of this machine cannot pass if 90 % are to keep a TPOT of `tpot`
    seconds."""
    return instances / least_seconds(machine, Mean.of(workload), tpot, max_running)


def least_seconds(machine: Machine, mean: Mean, tpot: float, max_running: int) -> float:
    """Instance seconds that a mean request costs at least."""
    most = max(1.0, min(float(max_running), machine.kv_capacity / mean.context))
    decodes = np.concatenate([[0.0], np.geomspace(1.0, most, 48)])
    others = np.concatenate([[0.0], np.geomspace(1.0, 16384.0, 72), [64.0, 128.0, 256.0, 512.0, 1024.0]])
    n, p = (grid.ravel()[1:] for grid in np.meshgrid(decodes, others, indexing="ij"))
    other_tokens = mean.prompt + mean.free
    seconds = _seconds(machine.truth, mean, n, p, other_tokens)
    without = n == 0
    cheapest = float((seconds[without] / p[without]).min())
    with_decodes = ~without
    n, p, seconds = n[with_decodes], p[with_decodes], seconds[with_decodes]

    def value(w: float, v: float) -> float:
        u = float(((seconds + w * n * (seconds - tpot) - v * p) / n).min())
        return u * mean.held + v * other_tokens

    def best_for(w: float) -> float:
        return _highest(lambda v: value(w, v), 0.0, cheapest)

    return _highest(best_for, 0.0, 20.0)


def _seconds(truth: StepCurve | Roofline, mean: Mean, n: Vector, p: Vector, other_tokens: float) -> Vector:
    """s(n, p): the other tokens are prompts and free decodes in their proportion."""
    prompts = p * mean.prompt / other_tokens
    free = p - prompts
    pairs = prompts * mean.attention / mean.prompt
    each = zip(prompts, pairs, n + free, (n + free) * mean.context, strict=True)
    return np.array([truth.of(float(a), float(b), float(c), float(d)) for a, b, c, d in each])


def _highest(of: object, low: float, high: float) -> float:
    """The greatest value of a concave function, by golden section."""
    assert callable(of)
    ratio = 0.6180339887498949
    a, b = low, high
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at_c, at_d = float(of(c)), float(of(d))
    for _ in range(40):
        if at_c < at_d:
            a, c, at_c = c, d, at_d
            d = a + ratio * (b - a)
            at_d = float(of(d))
        else:
            b, d, at_d = d, c, at_c
            c = b - ratio * (b - a)
            at_c = float(of(c))
    return max(at_c, at_d, float(of(low)), float(of(high)))
