"""Engines that were found, whose server is gone: which of them the next server takes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from taichi_serve.cluster.vllm.hosts.held import GoneError, Holding
from taichi_serve.cluster.vllm.hosts.words import Offer

PAUSE = 0.5  # seconds until those that say so are asked again

H = TypeVar("H")  # whatever a holder is asked by


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """One of them, and its holder."""

    offer: Offer
    holding: Holding

    @property
    def index(self) -> int:
        """The number of its instance: 3 of i3 and of i3.2."""
        return int(self.offer.name.removeprefix("i").split(".")[0])

    def end(self) -> None:
        """It is not wanted."""
        with contextlib.suppress(GoneError):
            self.holding.end()
        self.holding.leave()


def asked_until(
    ask: Callable[[list[H]], tuple[list[Found], list[H]]],
    holders: list[H],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[Found]:
    """What these offer. Those that say so are asked again, for so many seconds."""
    found: list[Found] = []
    ends = clock() + seconds
    while holders:
        more, holders = ask(holders)
        found += more
        if clock() >= ends:
            break
        if holders:
            pause(PAUSE)
    return found


def chosen(offers: Iterable[Found], count: int) -> dict[int, Found]:
    """Of each of so many instances one, by its number. They have met, so all of them are of one run: the one
    with the most."""
    here = [one for one in offers if one.index < count]
    runs = Counter(one.offer.run for one in here)
    if not runs:
        return {}
    most = max(sorted(runs), key=lambda run: runs[run])
    found: dict[int, Found] = {}
    for one in sorted(here, key=lambda one: one.offer.engine_id):
        if one.offer.run == most:
            found.setdefault(one.index, one)
    return found
