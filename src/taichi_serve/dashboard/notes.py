"""What happened to instances, and what operators did, in words."""

from __future__ import annotations

from taichi_serve.dashboard.rows import Note
from taichi_serve.messages import Added, Drained, Event, Joined, Lost, Promised, Removed, Silent, Slid, Tuned
from taichi_serve.sliders import Sliders

BAD, GOOD, PLAIN = "bad", "good", "plain"


def note(event: Event) -> Note | None:
    """The note of a fact; None where it is no such fact."""
    found = _of_instance(event) or _of_fleet(event) or _of_setting(event)
    return None if found is None else Note(event.at, *found)


def _of_instance(event: Event) -> tuple[str, str] | None:
    match event:
        case Lost(instance=name, why=why):
            return f"{name} was lost: {why}", BAD
        case Joined(instance=name):
            return f"{name} serves again", GOOD
        case Silent(instance=name, on=on):
            return (f"{name} does not answer", BAD) if on else (f"{name} answers again", GOOD)
        case Drained(instance=name, on=on):
            return f"{name} is drained" if on else f"{name} takes requests again", PLAIN
    return None


def _of_fleet(event: Event) -> tuple[str, str] | None:
    match event:
        case Added(instance=name, kind=kind):
            return f"{name} was added, {kind.value}", GOOD
        case Removed(instance=name):
            return f"{name} left", PLAIN
    return None


def _of_setting(event: Event) -> tuple[str, str, bool] | None:
    match event:
        case Slid(sliders=sliders):
            return f"sliders: {_sliders(sliders)}", PLAIN, True
        case Tuned(why=why, act=act):
            return f"sliders {'set themselves' if act else 'to be set'}: {why}", PLAIN, act
        case Promised(slo=slo):
            return f"SLO: TTFT {slo.ttft:g} s, TPOT {slo.tpot * 1000:g} ms", PLAIN, True
    return None


def _sliders(sliders: Sliders) -> str:
    kinds = f"{sliders.p_heavy} P-heavy with chunk {sliders.p_chunk}"
    return f"{kinds}, {sliders.d_heavy} D-heavy with chunk {sliders.d_chunk}"
