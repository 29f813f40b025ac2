"""One run of one contender: how many of the requests sent are good.

Goodput is the highest request rate at which 90 % of all requests sent are good (search/climb.py). A run with
that target ends as soon as it is reached or out of reach: waiting for the last long output decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from taichi_serve.bench.goodput import Meter, Tally
from taichi_serve.bench.workload import Workload
from taichi_serve.cluster.base import run
from taichi_serve.cluster.simulated import EngineShape, Link, SimulatedCluster
from taichi_serve.latency.predict import Predictor
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.latency.shipped import Machine
from taichi_serve.messages import Event, Tuned
from taichi_serve.scheduling.policy import BLIND, FETCH, KNOWN, PREFIXES, Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO
from taichi_serve.tuning.adviser import AtOnce
from taichi_serve.tuning.rehearsal import Limits
from taichi_serve.tuning.tuner import Tuner

TARGET = 0.9
Watch = Callable[[Tally], object]  # gets the counts of a run as it begins; they go on while it runs
LARGEST = 8192  # prompt tokens of the largest step


@dataclass(frozen=True)
class Scene:
    """What all contenders have in common: machine, link, workload and SLO."""

    machine: Machine
    workload: Workload
    slo: SLO
    bandwidth: float = 50e9  # bytes/s of an instance's port; see docs/simulation.md
    latency: float = 0.005  # seconds a transfer takes before any byte
    max_running: int = 256
    kv_capacity: int | None = None  # tokens, where instances are to have less than the machine
    slower: float = 1.0  # the truth's seconds over what the predictor believes
    host_kv: int = 0  # tokens of KV that an instance keeps in the memory of its host
    host_bandwidth: float = 20e9  # bytes/s at which it reads them
    prefixes: str = KNOWN  # whether the scheduler is told of prefixes, and may have them fetched

    def __post_init__(self) -> None:
        if self.prefixes not in PREFIXES:
            raise ValueError(f"prefixes {self.prefixes!r} are none of {', '.join(PREFIXES)}")

    @property
    def promised(self) -> dict[str, SLO]:
        """The SLO of each class of requests; of none where all have the same."""
        return {part.name: part.slo for part in self.workload.mix.parts}

    @property
    def loosest(self) -> SLO:
        """An SLO that no request's own is looser than."""
        slos = list(self.promised.values()) or [self.slo]
        return SLO(max(slo.ttft for slo in slos), max(slo.tpot for slo in slos))

    def cluster(
        self, sliders: Sliders, rate: float, requests: int, seed: int, happenings: tuple[Event, ...] = ()
    ) -> SimulatedCluster:
        """A cluster that will see these requests."""
        machine = self.machine
        truth = machine.truth if self.slower == 1.0 else machine.scaled(self.slower)
        return SimulatedCluster(
            sliders,
            [truth],
            EngineShape(
                machine.kv_capacity,
                self.max_running,
                self.workload.block_size,
                self.host_kv,
                self.host_bandwidth,
            ),
            Link(machine.kv_bytes_per_token, self.bandwidth, self.latency),
            self.workload.calls(rate, requests, seed),
            happenings,
            machine.max_model_len,
        )

    def scheduler(self, sliders: Sliders, policy: Policy, capacities: Mapping[str, int]) -> GlobalScheduler:
        """The scheduler that serves, for such a cluster."""
        known = 0 if self.prefixes == BLIND else self.workload.block_size
        fetch = policy.fetch or self.prefixes == FETCH
        policy = replace(policy, fetch=fetch, classes=self.workload.mix.classes)
        seats = self.max_running
        return GlobalScheduler(sliders, self.slo, self.predictor(), policy, capacities, known, seats)

    def tuner(self, scheduler: GlobalScheduler, act: bool = True) -> Tuner:
        """What moves the sliders of this scheduler; where it is not to `act` it makes suggestions."""
        machine, block_size = self.machine, self.workload.block_size
        capacity = min(i.kv_capacity for i in scheduler.instances.values())
        chunk = min(LARGEST, machine.max_model_len)
        kv = machine.kv_bytes_per_token
        limits = Limits(capacity, self.max_running, machine.max_model_len, chunk, block_size, kv)
        return Tuner(scheduler, scheduler, limits, AtOnce(), act)

    def predictor(self) -> Predictor:
        """What the policies ask: the fitted model, which is simpler than the truth."""
        transfer = Transfer(Kind.P_HEAVY, Kind.D_HEAVY, self.latency, self.bandwidth)
        pairs = {(a, b): transfer for a in Kind for b in Kind}
        return Profiled(self.machine.belief, pairs, self.machine.kv_bytes_per_token)


@dataclass(frozen=True)
class Contender:
    """Sliders and policy under a name."""

    name: str
    sliders: Sliders
    policy: Policy = field(default_factory=Policy)


def attain(
    scene: Scene,
    contender: Contender,
    rate: float,
    requests: int,
    seed: int,
    target: float | None = None,
    watch: Watch = lambda tally: None,
) -> Tally:
    """One run; with a target it ends as soon as that share of good requests is reached or out of reach."""
    cluster = scene.cluster(contender.sliders, rate, requests, seed)
    scheduler = scene.scheduler(contender.sliders, contender.policy, cluster.capacities)
    if target is None:
        meter = Meter(scheduler, scene.slo)
        watch(meter.tally)
        run(meter, cluster)
        return meter.tally
    needed = math.ceil(target * requests - 1e-9)
    meter = Meter(scheduler, scene.slo, requests - needed + 1, needed)
    for event in cluster.facts():
        for command in meter.on(event):
            cluster.send(command)
        if meter.decided:
            cluster.close()
    # Of those never sent none is good: the share is of all that were to be sent.
    return replace(meter.tally, sent=requests)


def attain_tuned(
    scene: Scene,
    contender: Contender,
    rate: float,
    requests: int,
    seed: int,
    act: bool,
    watch: Watch = lambda tally: None,
) -> tuple[Tally, list[Tuned]]:
    """One run to its end whose sliders set themselves, or of which is said how they would be set; and these
    changes."""
    cluster = scene.cluster(contender.sliders, rate, requests, seed)
    tuner = scene.tuner(scene.scheduler(contender.sliders, contender.policy, cluster.capacities), act)
    meter = Meter(tuner, scene.slo)
    watch(meter.tally)
    run(meter, cluster)
    return meter.tally, list(tuner.changes)
