"""A cluster on a virtual clock: the same facts and the same commands, with engines in miniature."""

from taichi_serve.cluster.simulated.cluster import SimulatedCluster
from taichi_serve.cluster.simulated.engine import Engine
from taichi_serve.cluster.simulated.job import Call
from taichi_serve.cluster.simulated.link import Link
from taichi_serve.cluster.simulated.step import EngineShape

__all__ = ["Call", "Engine", "EngineShape", "Link", "SimulatedCluster"]
