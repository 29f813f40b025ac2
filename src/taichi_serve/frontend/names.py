"""Which engine requests are behind an id that a client knows.

vLLM makes one engine request for each prompt and each choice, with a name of its own: the client's id, a
number here and there, and eight random characters. Names alone cannot tell `job` with a number from `job-2`,
so what belongs together is noted while the client's request is at hand.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict, deque
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a log is explained where no server is installed
    from starlette.types import Scope

KEEP = 10_000
# What vLLM's routes know of the HTTP request in whose context we are (`request.state`).
asking: ContextVar[dict[str, Any] | None] = ContextVar("asking", default=None)
_OURS = "taichi_asked"
_NOT_TAKEN = "taichi_not_taken"


@dataclass
class Asked:
    """One HTTP request: its id as in the response, the engine requests made of it, and, where one of them was
    turned away, after how many seconds it may come back. Its number tells it from others with its id."""

    id: str
    engine: list[str] = field(default_factory=list)
    retry_after: float | None = None
    number: int = 0


class Names:
    """The last HTTP requests that reached an engine."""

    def __init__(self, keep: int = KEEP) -> None:
        self._last: deque[Asked] = deque(maxlen=keep)
        self._numbers = itertools.count(1)
        self._elsewhere: OrderedDict[tuple[int, int], Asked] = (
            OrderedDict()
        )  # of `_last`, those that came to other front ends

    def note(self, engine_id: str, external_id: str) -> Asked:
        """An engine request is made in the present context, of the HTTP request that is the answer;
        `external_id` is what vLLM's route called it."""
        state = asking.get()
        asked: Asked | None = None if state is None else state.get(_OURS)
        if asked is None:
            metadata = None if state is None else state.get("request_metadata")
            its = external_id if metadata is None else metadata.request_id
            asked = Asked(its, number=next(self._numbers))
            self._last.append(asked)
            if state is not None:
                state[_OURS] = asked
        asked.engine.append(engine_id)
        return asked

    def belongs(self, asked: tuple[int, int], name: str, engine_id: str) -> None:
        """An engine request was made elsewhere, of the HTTP request `asked` (the incarnation of a front end,
        and a number there), which is answered with the id `name`."""
        found = self._elsewhere.get(asked)
        if found is None:
            if len(self._elsewhere) == self._last.maxlen:
                self._elsewhere.popitem(last=False)
            found = self._elsewhere[asked] = Asked(name, number=asked[1])
            self._last.append(found)
        found.engine.append(engine_id)

    def turn_away(self, engine_id: str, retry_after: float) -> None:
        """This engine request is turned away, and may come back after so many seconds."""
        for asked in reversed(self._last):  # it was among the last to come
            if engine_id in asked.engine:
                asked.retry_after = retry_after
                return

    def behind(self, request_id: str) -> list[list[str]]:
        """The engine requests of each HTTP request that was answered with this id, the newest first."""
        # A header is Latin-1 to vLLM's server, whatever the client wrote.
        spelled = {request_id, request_id.encode().decode("latin-1")}
        return [asked.engine for asked in reversed(self._last) if asked.id in spelled]


def asked_in(scope: Scope) -> Asked | None:
    """What is known of this HTTP request; None before an engine request is made of it."""
    found: Asked | None = scope.get("state", {}).get(_OURS)
    return found


def not_taken(why: str) -> None:
    """The HTTP request in whose context we are is turned away before an engine request is made of it."""
    state = asking.get()
    if state is not None:
        state[_NOT_TAKEN] = why


def not_taken_in(scope: Scope) -> str | None:
    """Why this HTTP request was turned away before an engine request was made of it; None: it was not."""
    why: str | None = scope.get("state", {}).get(_NOT_TAKEN)
    return why


def find(request_id: str, engine_ids: Iterable[str]) -> list[str]:
    """The same by name alone, for an event log: of several readings the first that has any counts."""
    known = list(engine_ids)
    if request_id in known:
        return [request_id]
    asked = re.escape(request_id)
    numbered = rf"{asked}[-_]\d+"  # a completion has a number for each prompt, others for more than one
    readings = (numbered, asked) if request_id.startswith("cmpl-") else (asked, numbered)
    for reading in readings:
        pattern = re.compile(rf"(?:\d+_)?{reading}-[0-9a-f]{{8}}")
        if found := [name for name in known if pattern.fullmatch(name)]:
            return found
    return []
