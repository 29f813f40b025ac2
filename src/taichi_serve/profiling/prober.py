"""Requests of our own on a running cluster, prompts back to back, and the steps that they make.

It stands where a scheduler stands: facts come in, commands go out. It knows what is in every step of the
instance that it measures, because nobody else sends that one anything; what a step did not hold as planned is
not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from statistics import median

from taichi_serve.latency.profile import StepRow
from taichi_serve.messages import (
    Abort,
    Arrived,
    Event,
    Finished,
    Flow,
    Flowed,
    Lost,
    Move,
    Outcome,
    Prefill,
    Prefilled,
    SetChunk,
    Stepped,
)
from taichi_serve.profiling.chain import Chain
from taichi_serve.profiling.grid import Cell, Hop
from taichi_serve.profiling.neighbours import Neighbours
from taichi_serve.profiling.probed import LostError, Probed
from taichi_serve.sliders import Kind

HERE, THERE = "i0", "i1"
SETTLE = 8  # prompt tokens of a request that only waits until an order before it was heard
PLAIN = 3  # steps with decodes only that are measured for each prompt
BEFORE_A_MOVE, AFTER_A_MOVE = 4, 28  # tokens: a move is one of a running decode, which then goes on


class Prober:
    """Steps on the first instance of a cluster, and moves from it to the second."""

    def __init__(self, cluster: Probed, neighbours: Neighbours | None = None) -> None:
        """`neighbours` are the instances that can be kept at work; by default none is."""
        self._cluster = cluster
        self._neighbours = neighbours
        self._events = cluster.events()
        self._residents: dict[str, int] = {}  # decodes that stay, and the tokens of each
        self._begun = 0  # tokens that each of them began with
        self._context = 0  # of all of them, in the step of the last fact

    # -------------------------------------------------------------------------------- neighbours

    async def neighbours_at_work(self) -> None:
        """Have them work, and wait until each is in the midst of it."""
        if self._neighbours is not None:
            self._neighbours.work()
            await self._settle(self._neighbours)

    async def neighbours_at_rest(self) -> None:
        """Have them rest, and wait until their last request has ended."""
        if self._neighbours is not None:
            self._neighbours.rest()
            await self._settle(self._neighbours)

    async def _settle(self, neighbours: Neighbours) -> None:
        while not neighbours.settled:
            await self._next()

    # ------------------------------------------------------------------------------------- steps

    async def stand(self, decodes: int, context: int, output: int, chunk: int) -> None:
        """Have so many decodes run, and nothing else; their prompts are computed `chunk` tokens a step."""
        await self.clear()
        await self.chunk(chunk)
        names = [await self._ask(context, output) for _ in range(decodes)]
        for name in names:
            self._cluster.send(Prefill(name, 0, HERE))
        self._begun, waiting = context, set(names)
        while waiting:
            event = await self._next()
            if isinstance(event, Prefilled) and event.request in waiting:
                self._residents[event.request] = context + 1
            if isinstance(event, Prefilled | Finished):  # one that failed is missed where steps are counted
                waiting.discard(event.request)

    def stands(self, decodes: int, context: int, made: int) -> bool:
        """Whether so many decodes that began with this context run, and none has made more than `made`."""
        longest = max(self._residents.values(), default=0)
        alike = len(self._residents) == decodes and (not decodes or self._begun == context)
        return alike and longest <= context + made

    async def clear(self) -> None:
        """End every decode that runs."""
        for name in list(self._residents):
            self._cluster.send(Abort(name, Outcome.CANCELLED, "it was only there to be measured"))
        while self._residents:
            await self._next()

    async def chunk(self, tokens: int, kind: Kind = Kind.P_HEAVY, on: str = HERE) -> None:
        """So many prompt tokens a step from now on."""
        self._cluster.send(SetChunk(on, kind, tokens))
        name = await self._ask(SETTLE, 1)
        self._cluster.send(Prefill(name, 0, on))
        while True:
            event = await self._next()
            if isinstance(event, Finished) and event.request == name:
                return

    async def measure(self, cell: Cell, passes: int, repeats: int) -> list[StepRow]:
        """The steps of a cell, each `repeats` times; its decodes must stand."""
        await self.chunk(cell.chunk)
        chain = Chain(cell, passes, repeats + 1)  # one more: the first and the last step do not count
        names = [await self._ask(tokens, 1) for tokens in chain.prompt_sizes]
        ahead = iter(names)
        # Never more than two at a time. Until its output is taken, a prompt that is through looks like a
        # decode to the engine's scheduler: a third would get the token that is left over for it, and chunks
        # would no longer be whole.
        for name in islice(ahead, 2):
            self._cluster.send(Prefill(name, 0, HERE))
        waiting, plain = set(names), repeats * PLAIN + 2  # two: here too the ends do not count
        while waiting or (self._residents and chain.plain < plain):
            event = await self._next()
            if isinstance(event, Stepped) and event.instance == HERE:
                chain.saw(event, self._context)
            elif isinstance(event, Finished) and event.request in waiting:
                waiting.discard(event.request)
                for name in islice(ahead, 1):
                    self._cluster.send(Prefill(name, 0, HERE))
        return medians(chain.rows())

    # ------------------------------------------------------------------------------------- moves

    async def move(self, hop: Hop) -> tuple[int, float, float] | None:
        """KV tokens that came over, seconds between two tokens, and those of a step there, of one move; None
        where it did not happen, or too late to see a step after it."""
        name = await self._ask(hop.tokens, BEFORE_A_MOVE + AFTER_A_MOVE)
        self._cluster.send(Prefill(name, 0, HERE))
        made, found, after = 0, None, list[float]()
        while True:
            match await self._next():
                case Prefilled(request=request) if request == name:
                    made = 1
                case Stepped(instance=instance) if made and instance == HERE:
                    made += 1
                    if made == BEFORE_A_MOVE:
                        self._cluster.send(Flow(name, 1, THERE, Move.OPERATOR))
                case Stepped(instance=instance, seconds=seconds) if instance == THERE:
                    after.append(seconds)
                case Flowed(request=request, kv_tokens=kv, gap=gap) if request == name:
                    found = kv, gap
                    after.clear()  # the step that the gap ended with began before it was heard
                case Finished(request=request) if request == name:
                    return (*found, median(after)) if found and after else None

    # ------------------------------------------------------------------------------------- facts

    async def _ask(self, prompt_tokens: int, output_tokens: int) -> str:
        name = self._cluster.ask(prompt_tokens, output_tokens)
        while True:
            event = await self._next()
            if isinstance(event, Arrived) and event.request == name:
                return name

    async def _next(self) -> Event:
        """The next fact, booked."""
        event = await anext(self._events)
        if self._neighbours is not None:
            self._neighbours.saw(event)
        match event:
            case Stepped(instance=instance) if instance == HERE:
                self._context = sum(self._residents.values())
                for name in self._residents.keys() - set(event.missed):
                    self._residents[name] += 1
            case Finished(request=request):
                self._residents.pop(request, None)
            case Lost(instance=instance, why=why):
                raise LostError(f"instance {instance} ended while it was measured: {why}")
        return event


def alike(rows: Iterable[StepRow]) -> dict[tuple[int, float, int], list[StepRow]]:
    """Rows by their work: prompt tokens, attention, decodes."""
    found: dict[tuple[int, float, int], list[StepRow]] = defaultdict(list)
    for row in rows:
        found[row.prefill_tokens, row.attention, row.decodes].append(row)
    return found


def medians(rows: Iterable[StepRow]) -> list[StepRow]:
    """Rows with the same work as one: the median of their seconds, to 0.1 us, and of the KV that grew."""
    return [
        StepRow(*work, round(median(r.kv_tokens for r in same)), round(median(r.seconds for r in same), 7))
        for work, same in alike(rows).items()
    ]
