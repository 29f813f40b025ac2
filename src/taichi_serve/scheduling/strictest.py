"""The strictest SLO among the requests under way: what those beside them must leave room for.

What a single request asks for rules no others: the strictest is never below what the server promises, to all
or to a class. Else one client that asks for what nobody can keep would make all others loose.
"""

from __future__ import annotations

from collections.abc import Iterable

from taichi_serve.classes import SLOClass
from taichi_serve.request import Request
from taichi_serve.slo import SLO


class Strictest:
    """Counts live requests by their limits; the least of either is kept at hand."""

    def __init__(self) -> None:
        self._ttfts: dict[float, int] = {}
        self._tpots: dict[float, int] = {}
        self._classes: tuple[SLOClass, ...] = ()
        self._server: SLO | None = None
        self._least: SLO | None = None  # of what the server promises
        self._slo: SLO | None = None

    def bound(self, server: SLO, classes: tuple[SLOClass, ...]) -> None:
        """The server promises this, and its classes what they say."""
        slos = [server, *(one.slo(server) or server for one in classes)]
        self._server, self._classes, self._slo = server, classes, None
        self._least = SLO(min(slo.ttft for slo in slos), min(slo.tpot for slo in slos))

    def promised(self, one: SLOClass) -> SLO:
        """What the server promises to a class."""
        assert self._server is not None, "nothing is promised yet"
        return one.slo(self._server) or self._server

    def add(self, slo: SLO) -> None:
        """A request with this SLO has come."""
        self._ttfts[slo.ttft] = self._ttfts.get(slo.ttft, 0) + 1
        self._tpots[slo.tpot] = self._tpots.get(slo.tpot, 0) + 1
        known = self._slo
        if known is not None and (slo.ttft < known.ttft or slo.tpot < known.tpot):
            self._slo = self._bounded(min(slo.ttft, known.ttft), min(slo.tpot, known.tpot))

    def drop(self, slo: SLO) -> None:
        """One with this SLO is over."""
        gone = [_take(self._ttfts, slo.ttft), _take(self._tpots, slo.tpot)]
        if any(gone):
            self._slo = None

    def promise(self, slo: SLO, requests: Iterable[Request]) -> None:
        """The server promises this from now on, and those of these that have no SLO of their own have it."""
        for request in requests:
            if not request.own_slo:
                self.drop(request.slo)
                request.slo = slo
                self.add(slo)
        self.bound(slo, self._classes)

    @property
    def slo(self) -> SLO | None:
        """The least TTFT and the least TPOT of all that live, within what is promised; None of none."""
        if self._slo is None and self._ttfts:
            self._slo = self._bounded(min(self._ttfts), min(self._tpots))
        return self._slo

    def beside(self, slo: SLO) -> SLO:
        """The same of all that live and this one, which is judged by its own however strict that is."""
        known = self.slo
        if known is None:
            return slo
        if known.ttft <= slo.ttft and known.tpot <= slo.tpot:
            return known
        return SLO(min(slo.ttft, known.ttft), min(slo.tpot, known.tpot))

    def _bounded(self, ttft: float, tpot: float) -> SLO:
        least = self._least
        return SLO(ttft, tpot) if least is None else SLO(max(ttft, least.ttft), max(tpot, least.tpot))


def _take(counts: dict[float, int], key: float) -> bool:
    """One less; whether it was the last."""
    counts[key] -= 1
    if counts[key]:
        return False
    del counts[key]
    return True
