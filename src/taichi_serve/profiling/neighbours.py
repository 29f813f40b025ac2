"""Instances at work beside the one that is measured.

Instances that share a GPU, or the cores of a host, slow each other down: memory and its bandwidth are one. A
profile of an instance whose neighbours are idle says how fast it can be, not how fast it is when all of them
serve. So they can be kept at work: each always has requests, whose chunks and decodes share its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taichi_serve.messages import Arrived, Event, Finished, Prefill, Prefilled, SetChunk
from taichi_serve.profiling.grid import Limits
from taichi_serve.profiling.probed import Probed
from taichi_serve.sliders import Kind

AT_ONCE, PROMPT, OUTPUT, CHUNK = 16, 1024, 128, 256  # about every second step has a chunk in it
SHARE = 0.5  # of the KV cache that they hold at most


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests at once on each, and the tokens of their prompts, outputs and chunks."""

    at_once: int = AT_ONCE
    prompt: int = PROMPT
    output: int = OUTPUT
    chunk: int = CHUNK

    @classmethod
    def within(cls, limits: Limits) -> Load:
        """As much of the usual load as an engine can take."""
        prompt = min(PROMPT, limits.sequence // 2)
        output = min(OUTPUT, limits.sequence // 4)
        held = int(SHARE * limits.kv_capacity) // (prompt + output)
        chunk = min(CHUNK, limits.step // 2)
        return cls(max(1, min(AT_ONCE, limits.sequences // 2, limits.step // 2, held)), prompt, output, chunk)


class Neighbours:
    """Their requests: one that has finished is followed by another until they are to rest."""

    def __init__(self, cluster: Probed, instances: Sequence[str], load: Load) -> None:
        """`instances` are all but the one that is measured."""
        self._cluster, self._instances, self._load = cluster, instances, load
        self._where: dict[str, str] = {}  # request: instance
        self._started: set[str] = set()  # instances that have computed a prompt since they began
        self._working = False

    @property
    def settled(self) -> bool:
        """Whether all of them are at work, or at rest, as they were told."""
        return self._started == set(self._instances) if self._working else not self._where

    def work(self) -> None:
        """Begin, unless they work already."""
        if self._working:
            return
        self._working = True
        self._started.clear()
        for instance in self._instances:
            self._cluster.send(SetChunk(instance, Kind.D_HEAVY, self._load.chunk))
            for _ in range(self._load.at_once):
                self._another(instance)

    def rest(self) -> None:
        """No more requests; those under way end by themselves."""
        self._working = False

    def saw(self, event: Event) -> None:
        """Book a fact, whoever it is about."""
        match event:
            case Arrived(request=request) if request in self._where:
                self._cluster.send(Prefill(request, 0, self._where[request]))
            case Prefilled(request=request) if request in self._where:
                self._started.add(self._where[request])
            case Finished(request=request) if request in self._where:
                instance = self._where.pop(request)
                if self._working:
                    self._another(instance)

    def _another(self, instance: str) -> None:
        name = self._cluster.ask(self._load.prompt, self._load.output)
        self._where[name] = instance
