"""A request's story in words: each fact and decision of its log as a line of what happened, and why.

`taichi explain` and the live page both tell it. Fields that a server does not send are left out, so the
record of an older or newer one can be told too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
Line = tuple[float | None, str, str]  # seconds since arrival, what happened or was decided, why


def lines(record: Record) -> Iterator[Line]:
    """The log in words. Facts have a time; a decision is made as soon as what it follows from is known."""
    for entry in record["log"]:
        at = entry["at"] - record["arrived_at"] if "at" in entry else None
        head, *forecasts = WORDS.get(entry["type"], _other)(entry)
        yield at, *head
        for what, why in forecasts:
            yield None, what, why


Words = list[tuple[str, str]]


def _arrived(entry: Record) -> Words:
    bound = entry.get("bound_by") or ("" if entry["movable"] else "cannot be moved exactly")
    why = f"{entry['prompt_tokens']} prompt tokens, at most {entry['max_tokens']} output"
    why += _own(entry)
    return [("arrived", f"{why}; stays on one instance: {bound}" if bound else why)]


def _own(entry: Record) -> str:
    """The class and the SLO that a request brought; an older server does not say."""
    slo, name = entry.get("slo"), entry.get("slo_class")
    said = f"; class {name}" if name else ""
    return said + (f"; SLO {slo['ttft']:g} s and {slo['tpot'] * 1e3:g} ms" if slo else "")


def _prefill(entry: Record) -> Words:
    then = "decode elsewhere" if entry["hand_over"] else "decode there"
    rows = [(f"-> prefill on {entry['on']}, {then}", entry.get("why") or _chosen(entry))]
    return rows + _forecasts(entry, entry["on"])


def _forecasts(entry: Record, taken: str) -> Words:
    rows = []
    for forecast in entry["forecasts"]:
        verdict = "feasible" if forecast["feasible"] else "not feasible"
        if not forecast.get("fits", True):
            verdict = "no room in its KV"
        elif not forecast.get("calm", True):
            verdict = "its decodes are at their TPOT margin"
        queue = f"{forecast['queued_prefill_tokens']} prompt tokens queued"
        if cached := forecast.get("cached", 0):
            queue += f", {cached} of its own cached"
        why = f"TTFT {forecast['ttft'] * 1000:.0f} ms, {queue}: {verdict}"
        rows.append((_mark(forecast["instance"], taken), why))
    return rows


def _chosen(entry: Record) -> str:
    feasible = [f["instance"] for f in entry["forecasts"] if f["feasible"]]
    if not feasible:
        return "none is feasible: the lowest predicted TTFT" if entry["forecasts"] else ""
    if len(feasible) == 1:
        return "the only feasible one"
    return "feasible; D-heavy first, then the fewest prompt tokens to compute"


def _prefilled(entry: Record) -> Words:
    how = "its KV waits for the decode" if entry["held"] else "decodes here"
    fetched, loaded = entry.get("fetched", 0), entry.get("loaded", 0)  # an older server does not say
    came = f", {fetched} of these came from another instance" if fetched else ""
    came += f", {loaded} of these came from the memory of its host" if loaded else ""
    what = f"{entry['cached']} prompt tokens were cached{came}; {how}"
    return [(f"first token from {entry['instance']}", what)]


def _demote(entry: Record) -> Words:
    return [("-> best effort", entry["why"])]


def _decline(entry: Record) -> Words:
    why = f"{entry['why']}; it may come back after {entry['retry_after']:.1f} s"
    return [("-> turned away", why), *_forecasts(entry, "")]


def _ahead(entry: Record) -> Words:
    return [(f"-> copy its KV ahead to {entry['to']}", entry["why"])]


def _move(entry: Record) -> Words:
    target = entry.get("to") or entry["on"]
    rows = [(f"-> {entry['move']} to {target}", entry["why"])]
    for look in entry.get("outlooks", ()):
        why = f"TPOT {look['tpot'] * 1000:.1f} ms, KV {look['load']:.1%} once it is there"
        rows.append((_mark(look["instance"], target), why if look["fits"] else f"{why}, too full"))
    return rows


def _flowed(entry: Record) -> Words:
    came = f"{entry['kv_tokens']} tokens of KV came over"
    here = entry.get("reused", 0) - entry["kv_tokens"]
    if here > 0:
        came += f", {here} were still here"
    what = f"{entry['output_tokens']} tokens out; {came}, gap {entry['gap'] * 1000:.0f} ms"
    return [(f"goes on at {entry['instance']}", what)]


def _refused(entry: Record) -> Words:
    return [("move refused", entry["why"])]


def _finished(entry: Record) -> Words:
    return [(entry["outcome"], f"{entry['output_tokens']} tokens out")]


def _tuned(entry: Record) -> Words:
    gain = entry["gain"]
    predicted = "" if gain is None else f" ({gain:+.0%} good requests predicted)"
    return [("sliders set themselves" if entry["act"] else "sliders to be set", f"{entry['why']}{predicted}")]


def _other(entry: Record) -> Words:
    return [(entry["type"].lower(), entry.get("why", ""))]


def _mark(instance: str, taken: str) -> str:
    return f"   {'*' if instance == taken else ' '} {instance}"


WORDS = {
    "Arrived": _arrived,
    "Prefill": _prefill,
    "Prefilled": _prefilled,
    "Ahead": _ahead,
    "Demote": _demote,
    "Decline": _decline,
    "Decode": _move,
    "Flow": _move,
    "Flowed": _flowed,
    "Refused": _refused,
    "Finished": _finished,
    "Tuned": _tuned,
}
