"""Everything that runs below HTTP, put together: the scheduler over the instances, its recorder, its tuner.

The front end is one process, this one, or several (several/): what the rest may ask of it is `Front`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vllm.config import VllmConfig

from taichi_serve.classes import Classes
from taichi_serve.cluster.base import drive
from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.identity import bytes_per_token
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.cluster.vllm.server.elastic import Elastic
from taichi_serve.cluster.vllm.server.engine import Engine
from taichi_serve.cluster.vllm.server.fleet import Fleet
from taichi_serve.cluster.vllm.server.gate import Gate
from taichi_serve.cluster.vllm.server.keeper import Keeper
from taichi_serve.cluster.vllm.server.process import StartError
from taichi_serve.eventlog import EventLog
from taichi_serve.frontend.adviser import Rehearsing
from taichi_serve.frontend.attendance import Attendance
from taichi_serve.frontend.ending import Ending
from taichi_serve.frontend.errors import SHUTTING_DOWN
from taichi_serve.frontend.glances import feed_of
from taichi_serve.frontend.record import Recorder
from taichi_serve.frontend.traced import Traces
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.frontend.viewers import Viewers
from taichi_serve.frontend.voice import Voice
from taichi_serve.latency.predict import Predictor
from taichi_serve.messages import Decline
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.scheduling.standing import able
from taichi_serve.scheduling.triage import drained
from taichi_serve.sliders import OFF, ON
from taichi_serve.slo import SLO
from taichi_serve.tuning.rehearsal import Limits
from taichi_serve.tuning.tuner import Tuner

log = logging.getLogger("taichi")
say = Voice()


class Front(Protocol):
    """What is in front of the scheduler: who owns the requests, and speaks to their clients."""

    closing: bool  # no new request is taken

    @property
    def unfinished(self) -> bool:
        """Whether a request is open."""
        ...

    def behind(self, request_id: str) -> list[list[str]]:
        """The engine requests of each HTTP request that was answered with this id, the newest first."""
        ...

    def added(self, index: int) -> None:
        """An instance of this number takes part."""
        ...

    def removed(self, index: int) -> None:
        """The instance of this number left for good."""
        ...

    def processes(self) -> list[dict[str, Any]]:
        """How its processes stand, where it has any of its own."""
        ...

    def fail(self, request_id: str, why: str) -> None:
        """Tell a client that its request ends with an error."""
        ...

    def decline(self, decline: Decline) -> None:
        """Tell a client that its request is turned away."""
        ...


@dataclass
class System:
    """Everything that runs, for the routes to look at."""

    cluster: VllmCluster
    scheduler: GlobalScheduler
    recorder: Recorder
    front: Front
    keeper: Keeper
    elastic: Elastic
    attendance: Attendance
    max_chunk: int
    settings: dict[str, Any]  # those it was started with
    classes: Classes
    tasks: list[asyncio.Task[None]]
    trouble: Trouble
    ending: Ending
    event_log: EventLog | None = None
    tuner: Tuner | None = None
    adviser: Rehearsing | None = None
    tracing: Traces | None = None
    viewers: Viewers = field(init=False)

    def __post_init__(self) -> None:
        self.viewers = Viewers(self.recorder, partial(feed_of, self), self.emptied)

    @property
    def engines(self) -> list[Engine]:
        """The instances that the scheduler knows, too: one that was just added or removed it may hear of in a
        moment."""
        return [engine for engine in self.cluster.engines if engine.name in self.scheduler.instances]

    def emptied(self) -> bool:
        """Whether the server ends, and nothing is open any more: who only looks is to leave, too."""
        return self.front.closing and not self.front.unfinished

    def unready(self) -> str | None:
        """Why a new request would not be taken now; None where it would."""
        return SHUTTING_DOWN if self.front.closing else self.attendance.unready()

    def drained(self) -> float:
        """Seconds until the first instance is predicted to be through with all prompts queued there now."""
        return drained(able(self.scheduler.instances.values()), self.scheduler.predictor)

    def fail(self, why: str) -> None:
        """End the server because it cannot go on."""
        self.ending.fail(why)
        signal.raise_signal(signal.SIGTERM)


Make = Callable[[Fleet, Attendance, Trouble], Front]


def assemble(
    args: argparse.Namespace, instances: Fleet, predictor: Predictor, slo: SLO, make: Make
) -> System:
    """The system over these instances, which decides from here on. `make` gives what is in front of it."""
    cluster, keeper = instances.cluster, instances.keeper
    capacities = {engine.name: engine.kv_capacity for engine in cluster.engines}
    block_size = cluster.hasher.block_size if cluster.hasher is not None else 0
    policy = flags.policy(args)
    if cluster.stays is not None:  # KV that cannot move cannot be fetched
        policy = replace(policy, fetch=False)
    config = cluster.engines[0].client.vllm_config
    seats = config.scheduler_config.max_num_seqs
    scheduler = GlobalScheduler(flags.sliders(args), slo, predictor, policy, capacities, block_size, seats)
    written = _event_log(args.event_log)
    trouble, ending, attendance = Trouble(say), Ending(), Attendance(cluster, keeper)
    recorder = Recorder(scheduler, bytes_per_token(config), written.write if written else None, trouble)
    front = make(instances, attendance, trouble)
    largest = config.scheduler_config.max_num_batched_tokens
    guarded = partial(trouble.guarded, "front end")
    added, removed = guarded(front.added), guarded(front.removed)
    elastic = Elastic(cluster, keeper, instances.launcher.devices, scheduler, added, removed)
    looked_at = (cluster, scheduler, recorder, front, keeper, elastic, attendance)
    system = System(*looked_at, largest, args.settings, flags.classes(args), [], trouble, ending, written)
    keeper.told.failed, keeper.told.hopeless = front.fail, system.fail
    if args.autotune != OFF:
        system.adviser = Rehearsing(trouble)
        limits = _limits(config, min(capacities.values()))
        guard = partial(trouble.guarded, "autotune")
        system.tuner = Tuner(recorder, scheduler, limits, system.adviser, args.autotune == ON, guard)
    driven = system.tuner or recorder
    gate = Gate(cluster, keeper.quarantine, front.decline)
    driving = asyncio.create_task(drive(driven, gate), name="drive")
    driving.add_done_callback(partial(drive_ended, system))
    system.tasks += [driving, *instances.supervise()]
    return system


def _limits(config: VllmConfig, kv_capacity: int) -> Limits:
    """What instances of this configuration can hold and take."""
    scheduling = config.scheduler_config
    return Limits(
        kv_capacity,
        scheduling.max_num_seqs,
        config.model_config.max_model_len,
        scheduling.max_num_batched_tokens,
        config.cache_config.block_size,
        bytes_per_token(config),
    )


def _event_log(path: str | None) -> EventLog | None:
    try:
        return EventLog(Path(path)) if path else None
    except OSError as wrong:
        raise StartError(f"the event log {path} cannot be written: {wrong.strerror}") from wrong


def drive_ended(system: System, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the scheduler failed; shutting down", exc_info=task.exception())
        system.fail(f"the scheduler failed: {task.exception()!r}")


async def let_go(system: System) -> None:
    """End what runs beside the requests: nothing decides any more."""
    for task in system.tasks:
        task.cancel()
    if system.adviser is not None:
        system.adviser.close()
    await asyncio.gather(*system.tasks, return_exceptions=True)
    if system.event_log is not None:
        system.trouble.guarded("event log", system.event_log.close)()
