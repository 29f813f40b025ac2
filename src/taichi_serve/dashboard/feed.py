"""What a viewer sees of the system: all of it at first, then what changed since the update before.

A feed exists while somebody looks. It is told every fact, and notes only whom the fact was about; what became
of these it reads off the scheduler's books when an update is due. So many facts about one request within a
tenth of a second cost one row, and an update costs what changed, not what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from taichi_serve.dashboard.attainment import Attainment, Point
from taichi_serve.dashboard.notes import note
from taichi_serve.dashboard.rows import Glance, Hop, Live, Note, Standing, Update
from taichi_serve.messages import (
    Arrived,
    Cached,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Prefill,
    Prefilled,
    Refused,
    SetChunk,
    Stepped,
)
from taichi_serve.request import Request, State
from taichi_serve.scheduling.scheduler import GlobalScheduler

FETCH = "fetch"  # beside the kinds of Move
SLOWLY = 1.0  # seconds between two looks at what changes slowly
FIGURES = 0.25  # seconds between two looks at instances: every step changes them
Bound = tuple[str, str | None]  # the kind of a move, and where it began


class Feed:
    """One for all viewers. `observe` may stand in the scheduler's way, and is short."""

    def __init__(
        self,
        scheduler: GlobalScheduler,
        attainment: Attainment,
        look: Callable[[], list[Glance]],
        stand: Callable[[float], Standing],
        happened: Iterable[Event],
    ) -> None:
        """`look` says how the instances are, `stand` what changes slowly, and `happened` what was worth a
        note before anybody looked."""
        self._scheduler = scheduler
        self._attainment = attainment
        self._look = look
        self._stand = stand
        self._happened = happened
        self._touched: dict[str, None] = {}  # a set in the order of the facts
        self._bound: dict[str, Bound] = {}
        self._hops: list[Hop] = []
        self._notes: list[Note] = []
        self._points = attainment.ended  # so many were sent
        self._known: dict[str, Glance] = {}  # instances as they were told last
        self._stand_at = self._look_at = float("-inf")
        for request in scheduler.requests.values():
            if request.state is State.MOVING and request.why is not None:
                self._bound[request.id] = request.why.value, request.instance

    def observe(self, event: Event, commands: Sequence[Command]) -> None:
        """A fact, and what was decided. Steps and caches need not be told where nothing was decided."""
        if type(event) not in (Stepped, Cached):
            self._note(event)
        for command in commands:
            if type(command) is not SetChunk:
                self._decided(event.at, command)

    def _note(self, event: Event) -> None:
        if isinstance(event, Flowed):
            move, source = self._bound.pop(event.request, ("move", None))
            if source != event.instance:  # else its decode begins where its prompt was: nothing moves
                hop = Hop(event.at, event.request, move, source, event.instance, event.kv_tokens, event.gap)
                self._hops.append(hop)
        elif isinstance(event, Refused | Finished):
            self._bound.pop(event.request, None)
        elif not isinstance(event, Arrived | Prefilled):
            if (found := note(event)) is not None:
                self._notes.append(found)
                self._stand_at = self._look_at = float("-inf")
            return
        self._touched[event.request] = None

    def _decided(self, at: float, command: Command) -> None:
        assert not isinstance(command, SetChunk)
        self._touched[command.request] = None
        if isinstance(command, Flow | Decode):
            request = self._scheduler.requests.get(command.request)
            source = request.instance if request is not None else None
            self._bound[command.request] = command.move.value, source
        elif isinstance(command, Prefill) and command.prefix_from is not None:
            tokens = command.prefix_tokens
            self._hops.append(Hop(at, command.request, FETCH, command.prefix_from, command.on, tokens, None))

    # ------------------------------------------------------------------------------------------ what is sent

    def snapshot(self, now: float) -> Update:
        """Everything, for somebody who knows nothing."""
        return Update(
            at=now,
            whole=True,
            standing=self._stand(now),
            instances=self._look(),
            requests=[live(request) for request in self._scheduler.requests.values()],
            points=list(self._attainment.points),
            notes=[found for event in self._happened if (found := note(event)) is not None],
        )

    def update(self, now: float) -> Update | None:
        """What changed; None where nothing did."""
        standing = None
        if now - self._stand_at >= SLOWLY:
            self._stand_at, standing = now, self._stand(now)
        instances, left = [], []
        if now - self._look_at >= FIGURES:
            self._look_at = now
            there = {one.name: one for one in self._look()}
            instances = [one for name, one in there.items() if one != self._known.get(name)]
            left, self._known = [name for name in self._known if name not in there], there
        if not (self._touched or standing or instances or left or self._notes):
            return None
        requests, touched, hops, notes = self._scheduler.requests, self._touched, self._hops, self._notes
        # Whatever goes wrong below, what was noted does not gather.
        self._touched, self._hops, self._notes = {}, [], []
        return Update(
            at=now,
            standing=standing,
            instances=instances,
            left=left,
            requests=[live(requests[name]) for name in touched if name in requests],
            gone=[name for name in touched if name not in requests],
            hops=hops,
            points=self._new_points(),
            notes=notes,
        )

    def _new_points(self) -> list[Point]:
        points, ended = self._attainment.points, self._attainment.ended
        new = min(ended - self._points, len(points))
        self._points = ended
        return list(islice(points, len(points) - new, None)) if new else []


def live(request: Request) -> Live:
    """The row of a request."""
    return Live(
        request.id,
        request.state.value,
        request.instance,
        request.target,
        request.why.value if request.why is not None else None,
        request.prompt_tokens,
        request.max_tokens,
        request.base,
        request.joined,
        request.arrived_at,
        request.first_at,
    )
