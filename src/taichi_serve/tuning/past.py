"""The last requests as a workload to rehearse, and whether they are of another sort than those before."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from taichi_serve.cluster.simulated import Call
from taichi_serve.tuning.rehearsal import Past
from taichi_serve.tuning.watch import Made, Seen

BLOCKS = 50_000  # of the last requests' prompts at most: those before are left out
SHARED = 0.05  # of the prompt tokens were cached: then prefixes are rehearsed too
CERTAIN = 5.0  # standard errors
RATIO = 1.25  # of two mean lengths, or rates
# Seconds, and times the median gap, from which on a gap is a pause; and of the last one, which goes on.
PAUSE, QUIET, MANY = 10.0, 2.0, 50


def past_of(seen: Sequence[Seen], now: float, limit: int, made: Made) -> Past | None:
    """The workload of these requests, in order of arrival; None where none has ended. `limit` is the most
    tokens that one may have.

    Who is under way will produce more than it has by now: it is given the length of one of those that ended
    and were longer, in turn; with none of these twice what it has."""
    lengths = sorted(s.output for s in seen if s.ended_at is not None)
    if not lengths or now <= seen[0].at:
        return None
    shared = sum(s.cached for s in seen) > SHARED * sum(s.prompt for s in seen)
    if shared:
        seen = _latest(seen)
    calls, turn = [], 0
    for one in seen:
        output = one.output
        if one.ended_at is None:
            out = made(one.name)
            longer = bisect_right(lengths, out)
            turn += 1
            left = len(lengths) - longer
            output = lengths[longer + turn * 7 % left] if left else 2 * out
        prompt = min(one.prompt, limit - 1)
        output = max(1, min(output, limit - prompt))
        blocks = one.blocks if shared else ()
        own = blocks, None, one.slo, one.slo_class
        calls.append(Call(one.at - seen[0].at, prompt, output, "", True, *own))
    return Past(tuple(calls), now - seen[0].at)


def _latest(seen: Sequence[Seen]) -> Sequence[Seen]:
    """As many of the last as have BLOCKS blocks together, one at least."""
    blocks = 0
    for number, one in enumerate(reversed(seen)):
        blocks += len(one.blocks)
        if blocks > BLOCKS:
            return seen[len(seen) - max(1, number) :]
    return seen


def pause(gaps: Sequence[float]) -> float:
    """Seconds from which on a gap between two requests is a pause: nobody was there, and the cluster ran
    empty. Where requests are rare, or come in bursts that are part of them, few gaps are."""
    return max(PAUSE, MANY * statistics.median(gaps)) if gaps else math.inf


def quiet(seen: Sequence[Seen], now: float) -> bool:
    """Whether the load has ended: since the last of these, in order of arrival, nobody came for long."""
    gaps = [b.at - a.at for a, b in pairwise(seen)]
    return bool(gaps) and now - seen[-1].at > max(QUIET, MANY * statistics.median(gaps))


def stretch(seen: Sequence[Seen], now: float, seconds: float, fewest: int) -> tuple[Sequence[Seen], float]:
    """The last of these, in order of arrival, without a pause among them, and when they end: at least so many
    within so many seconds. All where there are no such."""
    limit, end, last = pause([b.at - a.at for a, b in pairwise(seen)]), now, len(seen)
    for number in range(len(seen) - 1, -1, -1):
        if number and seen[number].at - seen[number - 1].at < limit:
            continue
        if last - number >= fewest and end - seen[number].at >= seconds:
            return seen[number:last], end
        last, end = number, seen[number - 1].at
    return seen, now


def life_of(seen: Sequence[Seen]) -> float:
    """Seconds that a request took, on average of those that ended; 0.0 where none did."""
    took = [s.ended_at - s.at for s in seen if s.ended_at is not None]
    return statistics.fmean(took) if took else 0.0


@dataclass(frozen=True, slots=True)
class Sort:
    """What sort of requests they are: mean and variance of the logarithm of their prompts, requests/s, and
    the squared coefficient of variation of the gaps between them: 1 is Poisson, above it come bursts."""

    count: int
    mean: float
    variance: float
    rate: float
    burst: float

    @classmethod
    def of(cls, seen: Sequence[Seen], span: float) -> Sort:
        """Of at least two requests that came within `span` seconds. Pauses do not count: they are none of
        the gaps, and no part of the span."""
        logs = [math.log(s.prompt + 1) for s in seen]
        gaps = [abs(b.at - a.at) for a, b in pairwise(seen)]
        limit = pause(gaps)
        span -= sum(gap for gap in gaps if gap >= limit)
        gaps = [gap for gap in gaps if gap < limit]
        mean = statistics.fmean(gaps)
        burst = statistics.pvariance(gaps) / mean**2 if mean else 1.0
        return cls(len(seen), statistics.fmean(logs), statistics.variance(logs), len(seen) / span, burst)

    def differs(self, other: Sort) -> bool:
        """Whether the two are certain to be of different sorts, and by enough to matter."""
        error = math.sqrt(self.variance / self.count + other.variance / other.count)
        lengths = abs(self.mean - other.mean)
        if lengths > math.log(RATIO) and lengths > CERTAIN * error:
            return True
        rates = abs(math.log(self.rate / other.rate))
        error = math.sqrt(max(1.0, self.burst, other.burst) * (1 / self.count + 1 / other.count))
        return rates > math.log(RATIO) and rates > CERTAIN * error
