"""A request's story as spans: stretches of time with a name, one within another, for whoever draws a trace.

A span is made of facts alone, when the request is over. Times are seconds on the clock of the facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from taichi_serve.dashboard.span import GAP, Span, Value, of_move, part
from taichi_serve.messages import (
    Arrived,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    Refused,
)


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a request beside its own facts: when each leg was `decided`, by its number, for that
    may follow from the fact of another request; and when its prompt was `scheduled`, by the engine's word."""

    decided: Mapping[int, float] = field(default_factory=dict)
    scheduled: float | None = None


UNTOLD = Told()


@dataclass(frozen=True, slots=True)
class _Placed:
    """A prompt that was sent to an instance."""

    command: Prefill
    at: float


@dataclass(frozen=True, slots=True)
class _Decoding:
    """A leg that makes tokens: it made the one with this number at first."""

    instance: str
    leg: int
    at: float
    token: int


@dataclass(frozen=True, slots=True)
class _Going:
    """A decided move, and from where."""

    command: Flow | Decode
    at: float
    source: str | None


def spans(history: Iterable[Event | Command], told: Told = UNTOLD) -> list[Span]:
    """The spans of a request, by the history that the recorder keeps of it: the waiting for an instance, the
    prefill, the decode of each leg, and each move.

    A history may have lost its beginning, or have no end yet: what is whole in it is told.
    """
    life = _Life(told)
    for said in history:
        life.take(said)
    return life.made


class _Life:
    """What is open of a request, on the way through its history."""

    def __init__(self, told: Told) -> None:
        self.told = told
        self.made: list[Span] = []
        self._at = 0.0  # of the last fact
        self._waits: float | None = None  # since when it is on no instance
        self._prompt: _Placed | None = None
        self._decoding: _Decoding | None = None
        self._left: str | None = None  # where its first token came from, if it is not decoded there
        self._going: _Going | None = None
        self._leg: int | None = None  # as decided last

    def take(self, said: Event | Command) -> None:
        """The next fact or decision."""
        if isinstance(said, Event):
            self._at = said.at
        if isinstance(said, Prefilled | Flowed) and self._leg not in (None, said.leg):
            return  # it came too late: that leg is over
        match said:
            case Arrived():
                self._waits = said.at
            case Prefill():
                self._placed(said)
            case Prefilled():
                self._prefilled(said)
            case Flow() | Decode():
                self._go(said)
            case Flowed():
                self._flowed(said)
            case Refused():
                self._refused(said)
            case Finished():
                self._finished(said)

    def _decided(self, leg: int) -> float:
        return max(self._at, self.told.decided.get(leg, self._at))

    def _add(
        self,
        name: str,
        began: float,
        ended: float,
        attributes: dict[str, Value],
        parts: Iterable[Span | None] = (),
        wrong: str | None = None,
    ) -> None:
        within = tuple(one for one in parts if one is not None)
        self.made.append(Span(name, began, max(began, ended), attributes, within, wrong))

    # --------------------------------------------------------------------------------------------- its prompt

    def _placed(self, command: Prefill) -> None:
        at = self._decided(command.leg)
        self._leg = command.leg
        if self._prompt is not None:
            self._unprefilled(at, "it was placed elsewhere before its first token")
        if self._waits is not None and at > self._waits:
            self._add("wait", self._waits, at, {})
        self._waits, self._prompt = None, _Placed(command, at)

    def _prefilled(self, event: Prefilled) -> None:
        placed, self._prompt = self._prompt, None
        if placed is not None:
            attributes = _of_prompt(placed.command)
            for name in ("cached", "fetched", "loaded"):
                if tokens := getattr(event, name):
                    attributes[f"taichi.{name}_tokens"] = tokens
            self._add("prefill", placed.at, event.at, attributes, self._within(placed, event))
        if event.held:
            self._left = event.instance
        else:
            self._decoding = _Decoding(event.instance, event.leg, event.at, 1)

    def _within(self, placed: _Placed, event: Prefilled) -> list[Span | None]:
        """The queue, the computing, and the copying of a prefix meanwhile."""
        parts: list[Span | None] = []
        began = self.told.scheduled
        if began is not None and placed.at <= began <= event.at:
            parts += [part("queue", placed.at, began), part("compute", began, event.at)]
        if event.fetch is not None and placed.command.prefix_from is not None:
            where: dict[str, Value] = {
                "taichi.from": placed.command.prefix_from,
                "taichi.to": event.instance,
                "taichi.kv_tokens": event.fetched,
            }
            parts.append(part("fetch", *event.fetch, where))
        return parts

    def _unprefilled(self, at: float, why: str | None) -> None:
        placed, self._prompt = self._prompt, None
        assert placed is not None
        self._add("prefill", placed.at, at, _of_prompt(placed.command), wrong=why)

    # ---------------------------------------------------------------------------------------------- its moves

    def _go(self, command: Flow | Decode) -> None:
        at = self._decided(command.leg)
        self._leg = command.leg
        if self._going is not None:
            self._unmoved(at, "it was sent elsewhere instead")
        here = self._decoding.instance if self._decoding is not None else self._left
        self._going = _Going(command, at, here)

    def _flowed(self, event: Flowed) -> None:
        going, self._going = self._going, None
        before, self._left = self._decoding, None
        left = event.timeline.left if event.timeline is not None else 0.0
        left = left or event.at - event.gap
        stays = going is not None and going.source == event.instance and going.command.move is not Move.RESCUE
        if before is not None and stays:
            return  # its decode goes on where it was
        if before is not None:
            self._decoded(before, left, event.output_tokens - before.token)
        if going is not None and not stays:
            attributes = _of_move(going)
            attributes["taichi.to"] = event.instance
            attributes["taichi.kv_tokens"] = event.kv_tokens
            attributes["taichi.reused_tokens"] = event.reused
            attributes[GAP] = event.gap
            line = event.timeline
            began = min(going.at, line.ahead) if line is not None and line.ahead else going.at
            parts = of_move(line, going.at) if line is not None else []
            self._add(going.command.move.value, min(began, left), event.at, attributes, parts)
        self._decoding = _Decoding(event.instance, event.leg, event.at, event.output_tokens)

    def _refused(self, event: Refused) -> None:
        if self._prompt is not None and self._prompt.command.leg == event.leg:
            self._unprefilled(event.at, event.why)
            self._waits = event.at
        elif self._going is not None and self._going.command.leg == event.leg:
            self._unmoved(event.at, event.why)

    def _unmoved(self, at: float, why: str) -> None:
        going, self._going = self._going, None
        assert going is not None
        self._add(going.command.move.value, going.at, at, _of_move(going), wrong=why)

    def _decoded(self, leg: _Decoding, at: float, tokens: int, wrong: str | None = None) -> None:
        attributes: dict[str, Value] = {
            "taichi.instance": leg.instance,
            "taichi.leg": leg.leg,
            "taichi.output_tokens": tokens,
        }
        self._add("decode", leg.at, at, attributes, wrong=wrong)

    # ------------------------------------------------------------------------------------------------ its end

    def _finished(self, event: Finished) -> None:
        ended = event.outcome
        wrong = ended.value if ended in (Outcome.FAILED, Outcome.REFUSED) else None
        if self._waits is not None:
            self._add("wait", self._waits, event.at, {}, wrong=wrong)
        if self._prompt is not None:
            self._unprefilled(event.at, wrong)
        if (going := self._going) is not None:  # it was over before it could leave
            overtaken = {**_of_move(going), "taichi.overtaken": True}
            self._add(going.command.move.value, going.at, event.at, overtaken, wrong=wrong)
        if (leg := self._decoding) is not None:
            self._decoded(leg, event.at, max(0, event.output_tokens - leg.token + 1), wrong)
        self._waits = self._decoding = self._left = self._going = None


def _of_prompt(command: Prefill) -> dict[str, Value]:
    found: dict[str, Value] = {"taichi.instance": command.on, "taichi.leg": command.leg}
    if command.why:
        found["taichi.why"] = command.why
    for forecast in command.forecasts:
        if forecast.instance == command.on:
            found["taichi.predicted_ttft"] = forecast.ttft
    return found


def _of_move(going: _Going) -> dict[str, Value]:
    command = going.command
    to = command.to if isinstance(command, Flow) else command.on
    found: dict[str, Value] = {"taichi.leg": command.leg, "taichi.to": to}
    if going.source is not None:
        found["taichi.from"] = going.source
    if command.why:
        found["taichi.why"] = command.why
    return found
