"""Overload: whether a decode would keep its TPOT, and have a seat and room, where it would run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from taichi_serve.instance import Instance
from taichi_serve.latency.predict import Average, Predictor
from taichi_serve.request import Request
from taichi_serve.scheduling.ledger import Ledger
from taichi_serve.scheduling.prefill import Placement
from taichi_serve.sliders import Kind

SOON = 0.5  # of the prompts queued, the share that will decode before somebody who decodes now ends
# Decodes that are kept on each instance for a class that falls short: such a share of those there, and so
# many at least. One prompt in a step changes the predicted TPOT by as much as a few decodes.
KEPT, LEAST = 0.2, 2


class Pace:
    """What the books say about the decodes to come. `lengths` is the mean length of all prompts."""

    def __init__(self, ledger: Ledger, predictor: Predictor, lengths: Average) -> None:
        self.ledger = ledger
        self.predictor = predictor
        self.lengths = lengths

    def slow(
        self,
        request: Request,
        placed: Placement,
        decoders: Sequence[Instance],
        beside: float = math.inf,
        keep: bool = False,
        fixed: bool = False,
    ) -> bool:
        """Whether its decode, where it would be, or on any D-heavy instance after a hand-over, is predicted
        to miss its TPOT: it would be late however soon it began, and slow the others down. Those that are
        queued, or on their way, will decode there before it. Or whether decodes beside it would that are to
        be kept for others (`keep`), those of a D-heavy instance a TPOT of `beside` (s).

        After a hand-over it waits for a seat there as long as the share that is lacking takes to become free,
        and where decodes are `fixed` to D-heavy instances for KV, too: its TPOT is longer by that share."""
        if request.max_tokens <= 1:
            return False
        # Of the mean length, not its own: else the long ones would be turned away first.
        length = int(self.lengths.value(request.prompt_tokens))
        queued = sum([one.queued_requests for one in self.ledger.instances.values()])
        before = queued / len(decoders) if decoders else queued
        handed = placed.hand_over and bool(decoders)
        coming, tpot = 1 + SOON * before, self.predictor.tpot
        for one in decoders if handed else [placed.instance]:
            most = min(request.slo.tpot, beside) if one.kind is Kind.D_HEAVY else request.slo.tpot
            now = tpot(one, 0)
            each = tpot(one, length) - now
            idle = now - one.decodes * each  # where that is too slow already it is not for want of room
            soon = coming + max(LEAST, KEPT * one.decodes) if keep else coming
            full = 1.0
            if handed:
                full = max(full, (one.decodes + one.arriving + soon) / one.seats)
            if fixed:
                full = max(full, (one.kv_tokens + one.reserved_tokens + soon * length) / one.kv_capacity)
            if (now + (soon + one.arriving) * each) * full <= most or idle > most:
                return False
        return True
