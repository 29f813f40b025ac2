"""The strictest SLO among the requests under way: what those beside them must leave room for."""

from __future__ import annotations

from collections.abc import Iterable

from taichi_serve.request import Request
from taichi_serve.slo import SLO


class Strictest:
    """Counts live requests by their limits; the least of either is kept at hand."""

    def __init__(self) -> None:
        self._ttfts: dict[float, int] = {}
        self._tpots: dict[float, int] = {}
        self._slo: SLO | None = None

    def add(self, slo: SLO) -> None:
        """A request with this SLO has come."""
        self._ttfts[slo.ttft] = self._ttfts.get(slo.ttft, 0) + 1
        self._tpots[slo.tpot] = self._tpots.get(slo.tpot, 0) + 1
        known = self._slo
        if known is not None and (slo.ttft < known.ttft or slo.tpot < known.tpot):
            self._slo = SLO(min(slo.ttft, known.ttft), min(slo.tpot, known.tpot))

    def drop(self, slo: SLO) -> None:
        """One with this SLO is over."""
        gone = [_take(self._ttfts, slo.ttft), _take(self._tpots, slo.tpot)]
        if any(gone):
            self._slo = None

    def promise(self, slo: SLO, requests: Iterable[Request]) -> None:
        """Those of these that have no SLO of their own have this one from now on."""
        for request in requests:
            if not request.own_slo:
                self.drop(request.slo)
                request.slo = slo
                self.add(slo)

    @property
    def slo(self) -> SLO | None:
        """The least TTFT and the least TPOT of all that live; None of none."""
        if self._slo is None and self._ttfts:
            self._slo = SLO(min(self._ttfts), min(self._tpots))
        return self._slo

    def beside(self, slo: SLO) -> SLO:
        """The same of all that live and this one."""
        known = self.slo
        if known is None:
            return slo
        if known.ttft <= slo.ttft and known.tpot <= slo.tpot:
            return known
        return SLO(min(slo.ttft, known.ttft), min(slo.tpot, known.tpot))


def _take(counts: dict[float, int], key: float) -> bool:
    """One less; whether it was the last."""
    counts[key] -= 1
    if counts[key]:
        return False
    del counts[key]
    return True
