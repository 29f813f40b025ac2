"""Why did this request go there? One readable table out of the event log.

For every decision about a request: when, what was decided and why, and below it what was predicted for every
instance that could have been taken, with a mark at the one that was.
"""

from __future__ import annotations

from collections.abc import Iterable

from taichi_serve.messages import (
    Abort,
    Arrived,
    Command,
    Decode,
    Event,
    Finished,
    Flow,
    Flowed,
    Forecast,
    Outlook,
    Prefill,
    Prefilled,
    Refused,
)

Line = tuple[float, str, str]  # when (s), what happened or was decided, why or with what figures


def about(request: str, event: Event, commands: Iterable[Command]) -> bool:
    """Whether this entry of the log says anything about the request."""
    return getattr(event, "request", None) == request or any(
        getattr(c, "request", None) == request for c in commands
    )


def explain(request: str, entries: Iterable[tuple[Event, Iterable[Command]]]) -> str:
    """The life of a request as a table; empty text when the log does not know it.

    Times are seconds since its arrival, or since the first entry about it where the log begins later.
    """
    lines: list[Line] = []
    for event, commands in entries:
        if getattr(event, "request", None) == request and (fact := _fact(event)):
            lines.append((event.at, *fact))
        for command in commands:
            if getattr(command, "request", None) == request:
                lines += [(event.at, *line) for line in _decision(command)]
    if not lines:
        return ""
    start = lines[0][0]
    width = max(len(what) for _, what, _ in lines)
    head = f"{'seconds':>9}  {'what':<{width}}  why"
    rows = [f"{at - start:>9.3f}  {what:<{width}}  {why}".rstrip() for at, what, why in lines]
    return "\n".join([f"request {request}", head, *rows]) + "\n"


def _fact(event: Event) -> tuple[str, str] | None:
    match event:
        case Arrived():
            fixed = "" if event.movable else f", cannot be moved: {event.bound_by}".removesuffix(": ")
            return "arrived", f"{event.prompt_tokens} prompt tokens, at most {event.max_tokens} output{fixed}"
        case Prefilled():
            how = "its KV waits for the decode" if event.held else "decodes here"
            return f"first token from {event.instance}", f"{event.cached} prompt tokens were cached; {how}"
        case Flowed():
            moved = f"KV of {event.kv_tokens} came over, {event.reused} reused, gap {event.gap * 1000:.0f} ms"
            return f"goes on at {event.instance}", f"{event.output_tokens} tokens out; {moved}"
        case Refused():
            return "move refused", event.why
        case Finished():
            return event.outcome.value, f"{event.output_tokens} tokens out"
    return None


def _decision(command: Command) -> list[tuple[str, str]]:
    match command:
        case Prefill():
            then = ", decode elsewhere" if command.hand_over else ", decode there"
            forecasts = [_forecast(f, command.on) for f in command.forecasts]
            return [(f"-> prefill on {command.on}{then}", command.why), *forecasts]
        case Decode():
            return _move(
                f"-> {command.move.value} to {command.on}", command.why, command.outlooks, command.on
            )
        case Flow():
            return _move(
                f"-> {command.move.value} to {command.to}", command.why, command.outlooks, command.to
            )
        case Abort():
            return [(f"-> {command.outcome.value}", command.why)]
    return []


def _forecast(forecast: Forecast, taken: str) -> tuple[str, str]:
    verdict = "feasible" if forecast.feasible else "not feasible"
    if not forecast.fits:
        verdict = "no room in its KV"
    elif not forecast.calm:
        verdict = "its decodes are at their TPOT margin"
    queue = f"{forecast.queued_prefill_tokens} prompt tokens queued"
    return _mark(forecast.instance, taken), f"TTFT {forecast.ttft:.3f} s, {queue}, {verdict}"


def _move(what: str, why: str, outlooks: Iterable[Outlook], taken: str) -> list[tuple[str, str]]:
    rows = [
        (
            _mark(look.instance, taken),
            f"TPOT {look.tpot * 1000:.1f} ms, KV {look.load:.1%} once it is there"
            + ("" if look.fits else ", too full"),
        )
        for look in outlooks
    ]
    return [(what, why), *rows]


def _mark(instance: str, taken: str) -> str:
    return f"   {'*' if instance == taken else ' '} {instance}"
