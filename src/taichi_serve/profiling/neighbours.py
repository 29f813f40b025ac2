"""Instances at work beside the one that is measured.

Instances that share a GPU, or the cores of a host, slow each other down: memory and its bandwidth are one. A
profile of an instance whose neighbours are idle says how fast it can be, not how fast it is when all of them
serve. So they can be kept at work: each always has requests, whose chunks and decodes share its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taichi_serve.messages import Arrived, Event, Finished, Outcome, Prefill, Prefilled, SetChunk
from taichi_serve.profiling.grid import Limits
from taichi_serve.profiling.probed import LostError, Probed
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
    """Their requests: one that has ended is followed by another until they are to rest."""

    def __init__(self, cluster: Probed, instances: Sequence[str], load: Load) -> None:
        """`instances` are all but the one that is measured."""
        self._cluster, self._instances, self._load = cluster, instances, load
        self._where: dict[str, str] = {}  # request: instance
        self._unseen: set[str] = set()  # the first requests of all, as long as their prompts are not computed
        self._working = False

    @property
    def settled(self) -> bool:
        """Whether all of them are in the midst of work, or at rest, as they were told."""
        return not (self._unseen if self._working else self._where)

    def work(self) -> None:
        """Begin, unless they work already.

        First requests differ in length, or all would prefill together, then decode together, for ever.
        """
        if self._working:
            return
        self._working = True
        for number, instance in enumerate(self._instances):
            self._cluster.send(SetChunk(instance, Kind.D_HEAVY, self._load.chunk))
            late = number / len(self._instances)  # no two instances are at the same point either
            for turn in range(self._load.at_once):
                share = (turn + 1 - late) / self._load.at_once
                self._unseen.add(self._another(instance, max(1, round(share * self._load.output))))

    def rest(self) -> None:
        """No more requests; those under way end by themselves."""
        self._working = False
        self._unseen.clear()

    def saw(self, event: Event) -> None:
        """Book a fact, whoever it is about. Raises LostError where a neighbour cannot work."""
        match event:
            case Arrived(request=request) if request in self._where:
                self._cluster.send(Prefill(request, 0, self._where[request]))
            case Prefilled(request=request):
                self._unseen.discard(request)
            case Finished(request=request, outcome=outcome) if request in self._where:
                instance = self._where.pop(request)
                self._unseen.discard(request)
                if outcome is not Outcome.FINISHED:
                    raise LostError(
                        f"instance {instance} could not serve while another was measured: {outcome.value}"
                    )
                if self._working:
                    self._another(instance, self._load.output)

    def _another(self, instance: str, output: int) -> str:
        name = self._cluster.ask(self._load.prompt, output)
        self._where[name] = instance
        return name
