"""What the tests of measuring share: engines whose truth is known."""

from __future__ import annotations

from collections.abc import AsyncIterator

from taichi_serve.cluster.simulated.agenda import Due
from taichi_serve.cluster.simulated.cluster import SimulatedCluster
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.cluster.simulated.link import Link
from taichi_serve.cluster.simulated.step import EngineShape
from taichi_serve.latency.identity import Identity
from taichi_serve.latency.model import Roofline
from taichi_serve.messages import Command, Event
from taichi_serve.profiling.grid import Grid, Limits
from taichi_serve.sliders import Kind, Sliders

TRUTH = Roofline(launch=0.002, mixed=0.001, token=1e-4, attention=2e-9, decode=5e-5, kv=1.2e-7, knee=192)
ENGINE = Identity("tiny", "none", 2048, {}, {})
LIMITS = Limits(kv_capacity=100_000, sequence=8192, step=2304, sequences=128)
GRID = Grid(chunks=(64, 256, 1024), decodes=(0, 4, 16), contexts=(128, 2048), moves=(128, 1024), repeats=3)
CHUNKS = {Kind.P_HEAVY: 1024, Kind.D_HEAVY: 64}


class Miniature:
    """One P-heavy engine in miniature and some D-heavy ones that can be asked; a link of 5 ms, 1 GB/s."""

    def __init__(self, d_heavy: int = 1) -> None:
        shape = EngineShape(LIMITS.kv_capacity)
        link = Link(bytes_per_token=2048, bandwidth=1e9, latency=0.005)
        self.cluster = SimulatedCluster(Sliders(1, d_heavy, 1024, 64), [TRUTH], shape, link, [])
        self.asked = 0

    def events(self) -> AsyncIterator[Event]:
        return self.cluster.events()

    def send(self, command: Command) -> None:
        self.cluster.send(command)

    def ask(self, prompt_tokens: int, output_tokens: int) -> str:
        agenda, name = self.cluster.agenda, f"p{self.asked}"
        self.asked += 1
        agenda.push(agenda.now, Due.ARRIVAL, Call(agenda.now, prompt_tokens, output_tokens, name))
        return name
