"""The real server side (VllmCluster, journeys, scheduler) over pretended engine cores, in a world where
anything may come late, in any order that sockets and processes allow, or never.

A world is made by its seed alone: chance is one generator, time is a counter, and the event loop runs tasks
in the order they were made. So a seed that failed fails again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pretended import FIRST, Core
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason

from taichi_serve.cluster.base import drive
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.passage import Passage
from taichi_serve.latency.predict import Learned
from taichi_serve.messages import Asked, Command, Drained, Event, Prefill, Slid
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO

SLIDERS = (Sliders(0, 2, 0, 16), Sliders(1, 1, 64, 16), Sliders(1, 2, 64, 0), Sliders(2, 2, 64, 16))
POLICIES = (
    Policy(ahead=True),
    Policy(watermark=0.5, hysteresis=0.1, dwell=0.0, ahead=True),
    Policy(watermark=1.0, ahead=True),
)
MOST_REQUESTS = 25


class World:
    """One run: what is real, what is pretended, and what the users got."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.chance = random.Random(seed)
        self.directory = directory
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.cores: dict[str, Core] = {}  # by engine id, the dead ones too
        self.wrong: list[str] = []
        self.sliders = self.chance.choice(SLIDERS)
        self.direct = self.happens(0.5)
        self.lives = Counter[str]()
        self.wanted: dict[str, int] = {}  # output tokens of each request
        self.bound: set[str] = set()
        self.cancelled: dict[str, None] = {}
        self.got: dict[str, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self.failed: dict[str, None] = {}
        self.losses = 0
        self.seen: Counter[str] = Counter()  # what became of fetches
        kinds = self.sliders.kinds()
        engines = [self.engine(k, f"i{k}", kinds[k], self.sliders.chunk(kinds[k])) for k in range(len(kinds))]
        self.cluster = VllmCluster(engines, self._deliver, 400.0, self._later)
        self.cluster._road.direct = lambda source, target: self.direct  # type: ignore[misc]
        self.scheduler = GlobalScheduler(
            self.sliders,
            SLO(0.5, self.chance.choice([0.03, 1e-5])),
            Learned(),
            self.chance.choice(POLICIES),
            {engine.name: 600 for engine in engines},
        )
        self.log: list[tuple[Event, list[Command]]] = []

    def engine(self, index: int, name: str, kind: Any, chunk: int) -> Engine:
        """A new incarnation of an instance."""
        self.lives[name] += 1
        engine_id = f"{name}.{self.lives[name]}"
        core = self.cores[engine_id] = Core(self, engine_id, chunk)
        log = self.directory / f"{engine_id}.log"
        process: Any = SimpleNamespace(engine_id=engine_id, log=log, host="")
        client: Any = core
        copiers: Any = core.copiers
        return Engine(index, name, process, client, copiers, kind, chunk)

    def happens(self, share: float) -> bool:
        """Chance."""
        return self.chance.random() < share

    def core(self, engine: Engine) -> Core:
        """What pretends to be this engine."""
        return self.cores[engine.process.engine_id]

    # --------------------------------------------------------------------------------- what the server uses

    def on(self, event: Event) -> list[Command]:
        """The scheduler, with a log."""
        commands = [self._fetching(command) for command in self.scheduler.on(event)]
        self.log.append((event, commands))
        return commands

    def _fetching(self, command: Command) -> Command:
        """Half of the prompts are to fetch some of what they are made of, from anywhere."""
        if not isinstance(command, Prefill) or self.happens(0.5):
            return command
        holder = self.chance.choice(self.cluster.engines).name
        return replace(command, prefix_from=holder, prefix_tokens=self.chance.randint(1, 90))

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self.timers.append((self.now + seconds, call))

    def _deliver(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            self.got.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                self.ends[output.request_id] += 1
                if output.finish_reason is FinishReason.ERROR:
                    self.failed[output.request_id] = None

    # ----------------------------------------------------------------------------------- what may happen

    def turn(self) -> None:
        """Something that is on its way arrives, or somebody does something."""
        self.now += 1.0
        for timer in [timer for timer in self.timers if timer[0] <= self.now and self.happens(0.5)]:
            self.timers.remove(timer)
            timer[1]()
        engine = self.chance.choice(self.cluster.engines)
        core = self.core(engine)
        if core.dead:
            return
        if core.outbox and self.happens(0.9):
            self.cluster.receive(engine, core.outbox.popleft())
            if self.happens(0.6):
                return
        if core.copiers.words and self.happens(0.8):
            self.cluster.hands.hear(core.copiers.words.popleft())
        if self.happens(0.8):
            core.answer()
        if core.silent:  # what it said before is still on its way
            return
        core.copiers.work()
        if len(core.outbox) < 3 and core.busy:
            core.step()

    def mischief(self) -> None:
        """What users, operators and bad days do."""
        dice, names = self.chance.random(), [engine.name for engine in self.cluster.engines]
        engine = self.chance.choice(self.cluster.engines)
        number = len(self.wanted)
        if dice < 0.06 and number < MOST_REQUESTS:
            self.ask(f"r{number}")
        elif dice < 0.10 and number:
            request, to = f"r{self.chance.randrange(number)}", self.chance.choice(names)
            self.cluster.tell(Asked(self.now, request, to))
        elif dice < 0.115:
            self.cluster.tell(Drained(self.now, engine.name, self.happens(0.5)))
        elif dice < 0.125 and number:
            self._abandon(f"r{self.chance.randrange(number)}")
        elif dice < 0.130:
            self._slide(len(names))
        elif dice < 0.134:
            self.lose(engine)
        elif dice < 0.140:
            self.restore(engine)
        elif dice < 0.146 and engine.alive:
            self.silence(engine, not self.core(engine).silent)

    def ask(self, name: str) -> None:
        """A request of 1 to 90 prompt tokens and 1 to 30 output tokens; one in ten cannot move."""
        self.wanted[name] = self.chance.randint(1, 30)
        bound = self.happens(0.1)
        if bound:
            self.bound.add(name)
        self.cluster.accept(
            EngineCoreRequest(
                request_id=name,
                prompt_token_ids=[1] * self.chance.randint(1, 90),
                mm_features=None,
                sampling_params=SamplingParams(
                    temperature=0.0, max_tokens=self.wanted[name], presence_penalty=1.0 if bound else 0.0
                ),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )

    def _abandon(self, name: str) -> None:
        if name in self.cluster.journeys:
            self.cancelled[name] = None
            self.cluster.abandon(name, cancelled=self.happens(0.7))

    def _slide(self, instances: int) -> None:
        p_heavy = self.chance.randrange(instances + 1)
        d_chunk = self.chance.choice([0, 16] if p_heavy else [16, 32])
        p_chunk = 64 if p_heavy else d_chunk
        self.cluster.tell(Slid(self.now, Sliders(p_heavy, instances - p_heavy, p_chunk, d_chunk)))

    def lose(self, engine: Engine) -> None:
        """An instance dies, with all that is in it."""
        if engine.alive:
            self.losses += 1
            self.core(engine).die()
            self.cluster.lose(engine, "killed")

    def restore(self, engine: Engine) -> None:
        """A lost instance comes back, empty."""
        if not engine.alive:
            self.cluster.join(self.engine(engine.index, engine.name, engine.kind, engine.chunk))

    def silence(self, engine: Engine, on: bool) -> None:
        """An instance stands still, which is noticed, or goes on."""
        self.core(engine).silent = on
        if self.happens(0.8) or not on:
            self.cluster.silence(engine, on)

    # -------------------------------------------------------------------------------------- a whole run

    async def live(self, turns: int = 1000) -> list[str]:
        """Mischief, then peace until everybody is served. Answers what is wrong."""
        driving = asyncio.ensure_future(drive(self, self.cluster))
        for _ in range(turns):
            self.turn()
            self.mischief()
            await self._breathe()
        for engine in list(self.cluster.engines):
            if engine.alive and self.core(engine).silent:
                self.silence(engine, False)
        for engine in list(self.cluster.engines):
            self.restore(engine)
        await self._peace(driving)
        found = [*self.wrong, *self.unserved(), *(self.left_over() if not self.cluster.journeys else [])]
        if driving.done() and (error := driving.exception()) is not None:
            found.append(f"the server's loop ended: {error!r}")
        driving.cancel()
        return found

    async def _breathe(self) -> None:
        for _ in range(self.chance.choice([0, 1, 3, 6])):
            await asyncio.sleep(0)

    async def _peace(self, driving: asyncio.Future[None]) -> None:
        """Until nothing is on its way any more; whoever is not served by then never will be."""
        still = 0
        for _ in range(12_000):
            busy = bool(self.cluster.journeys) or any(core.busy for core in self.cores.values())
            still = 0 if busy else still + 1
            if driving.done() or still > 20:
                break
            self.turn()
            await self._breathe()

    def unserved(self) -> list[str]:
        """Requests that did not get what they wanted, once and in order."""
        found = []
        for name, journey in self.cluster.journeys.items():
            known = self.scheduler.requests.get(name)
            state = None if known is None else (known.state.value, known.instance, known.target, known.leg)
            where = journey.seat.engine_id if journey.seat else None
            found.append(
                f"{name} hangs: {journey.stage.value} at {where}, leg {journey.leg}; scheduler {state}"
            )
        if not self.cluster.journeys and self.scheduler.requests:
            found.append(f"the scheduler still has {list(self.scheduler.requests)}")
        for name, count in self.wanted.items():
            got = self.got.get(name, [])
            if got != [FIRST + k for k in range(len(got))]:
                found.append(f"{name} got {got}")
            excused = name in self.cancelled or name in self.failed or name in self.cluster.journeys
            if not excused and (len(got) != count or self.ends[name] != 1):
                found.append(f"{name} got {len(got)} of {count} tokens and {self.ends[name]} ends")
            if self.ends[name] > 1:
                found.append(f"{name} ended {self.ends[name]} times")
            if name in self.failed and not (self.losses and name in self.bound):
                found.append(f"{name} failed")
        if self.cluster.hands.astray:
            found.append(f"{self.cluster.hands.astray} journeys went astray")
        return found

    def left_over(self) -> list[str]:
        """What nobody needs any more and somebody still has."""
        found = [f"passage {passage.reader} {passage.passing.value}" for passage in self._passages()]
        for engine in self.cluster.engines:
            core = self.core(engine)
            if engine.legs or engine.residents:
                found.append(f"{engine.name} has legs {list(engine.legs)} {list(engine.residents)}")
            for what in ("legs", "held", "pins"):
                left = list(getattr(core, what))
                found += [f"{core.engine_id} has {what} {left}"] if left else []
        ledger = self.scheduler.instances
        for name, entry in ledger.items():
            sums = (
                entry.decodes,
                entry.arriving,
                entry.queued_tokens,
                entry.reserved_tokens,
                entry.leaving_tokens,
            )
            if any(sums):
                found.append(f"the ledger of {name} has {sums}")
        return found

    def _passages(self) -> list[Passage]:
        return list(self.cluster.hands.passages.values())
