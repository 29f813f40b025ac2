"""For which legs KV is being read into blocks here, and what of it may count.

A leg is in this book from when blocks were given to it that a peer's KV is read into until it is certain
what is in them: the outputs of the step that read it, or that waited for its last blocks, were taken in and
named none of them invalid; or it is over otherwise, and whoever writes into them has said that it does so no
more. Until then

- none of its blocks is in the prefix cache (unconfirmed.py), and no reader is shown more of them than what
  was here before;
- no block of it is given to anybody else;
- who asked for it to be dropped has no answer (`settled`).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future

from taichi_serve.cluster.vllm.wire import Given


class Reads:
    """The book. One writer: the engine core's own thread."""

    def __init__(self) -> None:
        self._given: dict[str, Given] = {}
        self._lent: set[str] = set()
        self._asked: dict[str, list[Future[bool]]] = {}
        self._waiting: list[Future[bool]] = []  # until nothing is read for anybody

    def __contains__(self, leg: str) -> bool:
        return leg in self._given

    def __len__(self) -> int:
        return len(self._given)

    def begin(self, given: Given, lent: bool = False) -> None:
        """Blocks were given to the leg, and KV is read into those from `first` on: by a step or by
        vLLM; or they are `lent` to the copiers, which write into them at any time until they return them.
        """
        self._given[given.leg] = given
        if lent:
            self._lent.add(given.leg)

    def lent(self, leg: str) -> Given | None:
        """The blocks of a leg that belong to the copiers."""
        return self._given[leg] if leg in self._lent else None

    def certain(self, leg: str) -> int | None:
        """How many of the leg's blocks may be believed in; None where all may."""
        given = self._given.get(leg)
        return None if given is None else given.first

    def struck(self, invalid: Iterable[int]) -> set[str]:
        """Legs into one of whose blocks KV could not be read."""
        numbers = set(invalid)
        return {leg for leg, one in self._given.items() if not numbers.isdisjoint(one.blocks[one.first :])}

    def over(self, leg: str) -> None:
        """Nothing is read for the leg any more; whoever waits for that hears it now."""
        self._given.pop(leg, None)
        self._lent.discard(leg)
        for future in self._asked.pop(leg, ()):
            future.set_result(True)
        while self._waiting and not self._given:
            self._waiting.pop().set_result(True)

    def none(self) -> Future[bool] | bool:
        """True when nothing is read for any leg: now, or later."""
        if not self._given:
            return True
        self._waiting.append(Future())
        return self._waiting[-1]

    def nobody_asks(self) -> None:
        """Whoever waits for an answer is gone."""
        self._asked.clear()
        self._waiting.clear()

    def settled(self, leg: str) -> Future[bool] | bool:
        """True when nothing is read for the leg: now, or later."""
        if leg not in self._given:
            return True
        future: Future[bool] = Future()
        self._asked.setdefault(leg, []).append(future)
        return future
