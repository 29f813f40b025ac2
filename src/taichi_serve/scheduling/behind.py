"""Overload: what follows when an instance falls behind what was predicted for those queued on it."""

from __future__ import annotations

from taichi_serve.instance import Instance
from taichi_serve.messages import Command, Prefill
from taichi_serve.request import Request
from taichi_serve.scheduling.dispatch import Dispatcher
from taichi_serve.scheduling.policy import SERVE


def sort(dispatcher: Dispatcher, instance: Instance, now: float) -> list[Command]:
    """Of those queued on an instance, each by which a deadline there would be missed goes where it is in time
    itself; where there is no such place it is best effort."""
    if dispatcher.policy.overload == SERVE:
        return []
    commands: list[Command] = []
    for victim, end, late in dispatcher.triage.hopeless(instance, now):
        moved = elsewhere(dispatcher, victim, instance, now)
        why = f"{late.id} needs {end:.3g} s more, and {late.by - now:.3g} s are left"
        commands.append(moved or dispatcher.demote(victim, now, why))
    return commands


def elsewhere(dispatcher: Dispatcher, request: Request, instance: Instance, now: float) -> Prefill | None:
    """Place a queued prompt, which has no token yet to lose, on another instance, where it is in time and
    makes nobody late. Should it have begun meanwhile, its tokens go with it: so only those that can move."""
    others = [one for one in dispatcher.able() if one is not instance and one.answers]
    if not (others and request.movable):
        return None
    low = dispatcher.low()
    placed, known = dispatcher.choose(request, now, others, low)
    before = request.work
    request.work = dispatcher.predictor.work(placed.instance, request.prompt_tokens, placed.cached)
    triage = dispatcher.triage
    if triage.lacking(request, placed) or triage.harming(request, placed.instance, now, everybody=True):
        request.work = before
        return None
    dispatcher.ledger.take_back(request)
    placed.why = f"{instance.name} fell behind; {placed.why}"
    return dispatcher.enqueue(request, placed, known, now)
