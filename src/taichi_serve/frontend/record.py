"""What happened, for whoever asks later: the last requests with their legs and decisions, and counters.

It stands between the facts and the scheduler, sees both sides, and changes nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from taichi_serve.dashboard.attainment import Attainment
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.messages import (
    Added,
    Arrived,
    Cached,
    Command,
    Decode,
    Drained,
    Event,
    Finished,
    Flow,
    Flowed,
    Joined,
    Lost,
    Move,
    Outcome,
    Prefilled,
    Promised,
    Refused,
    Removed,
    SetChunk,
    Silent,
    Slid,
    Stepped,
    Tuned,
)
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind
from taichi_serve.tuning.scale import Load, working

KEEP = 10_000
KEEP_TUNED = 1000
KEEP_HAPPENED = 100
KEEP_PROMPTS = 101
# After these there may be other instances than before, or others of a kind.
FLEET = (Added, Removed, Lost, Joined, Drained, Slid, Tuned)
OFTEN = (Stepped, Cached)  # observers are told of these only where something was decided
History = list[Event | Command]
Write = Callable[[Event, Sequence[Command]], object]
Observe = Callable[[Event, Sequence[Command]], object]


class Recorder:
    """A scheduler around the scheduler: the same decisions, and a memory of them."""

    def __init__(
        self,
        scheduler: GlobalScheduler,
        bytes_per_token: int,
        write: Write | None = None,
        trouble: Trouble | None = None,
    ) -> None:
        """`write` gets every fact with its decisions. Neither it nor the memory is essential: where one of
        them fails, `trouble` counts it, and the decisions go their way."""
        self.trouble = trouble or Trouble()
        self.scheduler = scheduler
        self.bytes_per_token = bytes_per_token
        self.histories: OrderedDict[str, History] = OrderedDict()
        self.accepted = 0
        self.outcomes: Counter[Outcome] = Counter()
        self.moves: Counter[Move] = Counter()
        self.bound: Counter[str] = Counter()
        self.recomputes = 0
        self.moved_bytes = 0
        self.gaps: deque[float] = deque(maxlen=1000)  # seconds, of the last moves
        self.steps: Counter[str] = Counter()
        self.prefill_tokens: Counter[str] = Counter()
        self.output_tokens: Counter[str] = Counter()  # of resident decodes, by instance
        self.fetches = 0  # prompts for which a prefix came from another instance
        self.tuned: deque[Tuned] = deque(maxlen=KEEP_TUNED)
        self.happened: deque[Event] = deque(maxlen=KEEP_HAPPENED)  # to instances, and by operators
        self.prompts: deque[int] = deque(maxlen=KEEP_PROMPTS)  # lengths of the last ones, in tokens
        self.attainment = Attainment(lambda: scheduler.slo)
        self.load = Load()  # by which it is said how many instances are wanted
        self._fleet = self._who_works()
        # Who is told facts with their decisions while somebody looks; they may not raise.
        self.observers: list[Observe] = []
        self._why: dict[str, Move] = {}
        self._write = self.trouble.guarded("event log", write) if write else None
        self._remember = self.trouble.guarded("record", self._remembered)

    def on(self, event: Event) -> Sequence[Command]:
        """Pass the fact on, and remember it with the decisions that came of it."""
        commands = self.scheduler.on(event)
        if commands or type(event) is not Cached:  # which no history tells, and no counter counts
            self._remember(event, commands)
        if self._write is not None:
            self._write(event, commands)
        if self.observers and (commands or type(event) not in OFTEN):
            for observe in self.observers:
                observe(event, commands)
        return commands

    def _remembered(self, event: Event, commands: Sequence[Command]) -> None:
        if type(event) is Stepped:
            self.steps[event.instance] += 1
            self.prefill_tokens[event.instance] += event.prefill_tokens
            self.output_tokens[event.instance] += event.decodes
            if (instance := self.scheduler.instances.get(event.instance)) is not None:
                tpot, watermark = self.scheduler.slo.tpot, self.scheduler.policy.watermark
                self.load.stepped(instance, event, tpot, watermark)
            if not commands:
                return
        else:
            self._count(event)
            self._begin_anew(event)
            self.attainment.on(event)
        if type(event) is Arrived and event.blocks:  # thousands of numbers that say nothing to a reader
            event = replace(event, blocks=())
        for request, part in parts(event, commands):
            self._history(request).append(part)
            if isinstance(part, Decode | Flow):
                self._why[request] = part.move

    def _history(self, request: str) -> History:
        history = self.histories.get(request)
        if history is None:
            history = self.histories[request] = []
            if len(self.histories) > KEEP:
                self.histories.popitem(last=False)
        return history

    def _count(self, event: Event) -> None:
        match event:
            case Arrived(bound_by=why, prompt_tokens=tokens):
                self.accepted += 1
                self.prompts.append(tokens)
                if why:
                    self.bound[why] += 1
            case Finished(request=request, outcome=outcome):
                self.outcomes[outcome] += 1
                self._why.pop(request, None)
            case Prefilled(fetched=fetched):
                self.fetches += fetched > 0
            case Tuned():
                self.tuned.append(event)
                self.happened.append(event)
            case Added() | Removed() | Lost() | Joined() | Silent() | Drained() | Slid() | Promised():
                self.happened.append(event)
            case Flowed(request=request, kv_tokens=kv_tokens, gap=gap, reused=reused):
                if (move := self._why.get(request)) is not None:
                    self.moves[move] += 1
                self.gaps.append(gap)
                self.moved_bytes += kv_tokens * self.bytes_per_token
                self.recomputes += reused == 0

    def _begin_anew(self, event: Event) -> None:
        """What was asked of other instances, or under another promise, says nothing about these. Chunks alone
        begin nothing: a tuner moves them every few seconds just when more instances are wanted."""
        before = self._fleet
        if isinstance(event, FLEET):
            self._fleet = self._who_works()
        if self._fleet != before or isinstance(event, Promised):
            self.load.begin(event.at)

    def _who_works(self) -> list[tuple[str, Kind]]:
        return [(one.name, one.kind) for one in self.scheduler.instances.values() if working(one)]

    def find(self, request_id: str) -> list[str]:
        """The engine requests behind an id of the OpenAI API (one for each prompt and choice)."""
        return find(request_id, self.histories)

    def view(self, request: str) -> dict[str, Any]:
        """One request in words a person can read."""
        return view(request, self.histories[request], self.tuned)


def parts(event: Event, commands: Iterable[Command]) -> Iterator[tuple[str, Event | Command]]:
    """What of a fact and its decisions belongs to the history of a request, with the request."""
    if isinstance(event, Arrived | Prefilled | Flowed | Refused | Finished):
        yield event.request, event
    for command in commands:
        if not isinstance(command, SetChunk):
            yield command.request, command


def find(request_id: str, requests: Iterable[str]) -> list[str]:
    """Those among the engine requests that are behind an id of the OpenAI API."""
    found = []
    for name in requests:
        if name == request_id:
            return [name]
        if name.startswith(f"{request_id}-") or f"_{request_id}-" in name:
            found.append(name)
    return found


def view(request: str, history: History, tuned: Iterable[Tuned] = ()) -> dict[str, Any]:
    """Where a request was, leg by leg, and every fact and decision in order, and how the sliders were
    `tuned` meanwhile."""
    # A history may have lost its beginning: then time begins with the first fact that is there.
    arrived = next((e.at for e in history if isinstance(e, Event)), 0.0)
    whole = with_tuned(history, [one for one in tuned if one.at >= arrived])
    rows = [{"type": type(e).__name__, **msgspec.to_builtins(e)} for e in whole]
    return {"id": request, "arrived_at": arrived, "legs": legs(history), "log": rows}


def with_tuned(history: History, tuned: Sequence[Tuned]) -> History:
    """The history of a request with these changes of sliders among its facts; none after it was over."""
    left, whole = deque(tuned), History()
    for part in history:
        while left and isinstance(part, Event) and left[0].at <= part.at:
            whole.append(left.popleft())
        whole.append(part)
    over = any(isinstance(part, Finished) for part in history)
    return whole if over else [*whole, *left]


def legs(history: History) -> list[dict[str, Any]]:
    """Where a request was: for each leg the instance, the time of its first token there, and its tokens."""
    rows: list[dict[str, Any]] = []
    for event in history:
        match event:
            case Prefilled():
                rows.append(_leg(event, "prefill", 1, 0, None))
            case Flowed():
                row = _leg(event, "decode", event.output_tokens, event.kv_tokens, event.gap)
                row["timeline"] = msgspec.to_builtins(event.timeline)
                rows.append(row)
    return rows


def _leg(event: Prefilled | Flowed, kind: str, tokens: int, kv: int, gap: float | None) -> dict[str, Any]:
    return {
        "leg": event.leg,
        "instance": event.instance,
        "kind": kind,
        "first_token_at": event.at,
        "output_tokens": tokens,
        "kv_tokens": kv,
        "gap": gap,
    }
