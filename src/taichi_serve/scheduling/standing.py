"""Who may be sent work: by what is alive, answers, is being drained, or takes prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from taichi_serve.instance import Instance
from taichi_serve.sliders import Kind


def serving(instances: Iterable[Instance]) -> list[Instance]:
    """Who may get new work; when all that answer are being drained, these; when none answers, all that
    live."""
    instances = list(instances)
    return [i for i in instances if i.serving] or _left(instances)


def able(instances: Iterable[Instance]) -> list[Instance]:
    """Who may get a prompt; an instance being drained only when nobody else can, and a silent one only when
    no other lives."""
    instances = list(instances)
    able = [i for i in instances if i.prefills]
    if not able:
        return [i for i in _left(instances) if i.chunk and not i.closing]
    return [i for i in able if i.serving] or able


def able_and_low(instances: Collection[Instance]) -> tuple[list[Instance], list[Instance]]:
    """Who may get a prompt, and the D-heavy ones of those who may get new work: `able` and `serving` in one
    go, for this is asked at every arrival."""
    found, low = list[Instance](), list[Instance]()
    for one in instances:
        if one.alive and not (one.silent or one.draining):
            if one.chunk > 0 and not one.closing:
                found.append(one)
            if one.kind is Kind.D_HEAVY:
                low.append(one)
    return (found, low) if found else (able(instances), decoders(serving(instances)))


def of_kind(instances: Iterable[Instance], kind: Kind) -> list[Instance]:
    """Who of these may get new work and is of this kind."""
    return [i for i in instances if i.serving and i.kind is kind]


def decoders(instances: Iterable[Instance]) -> list[Instance]:
    """The D-heavy ones of these."""
    return [i for i in instances if i.kind is Kind.D_HEAVY]


def _left(instances: list[Instance]) -> list[Instance]:
    alive = [i for i in instances if i.alive]
    return [i for i in alive if i.answers] or alive


@dataclass(slots=True)
class Standing:
    """All of these lists at one moment: `low` are the D-heavy ones that serve, `kinds` who serves of each
    kind even where others would have to."""

    serving: list[Instance]
    able: list[Instance]
    low: list[Instance]
    kinds: dict[Kind, list[Instance]]

    @classmethod
    def of(cls, instances: Iterable[Instance]) -> Standing:
        """As these instances stand now."""
        instances = list(instances)
        here = serving(instances)
        kinds = {kind: of_kind(instances, kind) for kind in Kind}
        return cls(here, able(instances), decoders(here), kinds)

    def lists(self) -> list[list[Instance]]:
        """Every list."""
        return [self.serving, self.able, self.low, *self.kinds.values()]
