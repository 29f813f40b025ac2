"""What one visit takes of the machine: read before and after it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from taichi_serve.bench.endpoint import Endpoint
from taichi_serve.bench.usage import Usage


@dataclass(frozen=True, slots=True)
class Reading:
    """So far: processor seconds of the server, and of those beside it; joules of all GPUs. None where nobody
    can say. `gpu_bytes` is what the server's start took of their memory."""

    cpu: float | None
    beside: float
    joules: float | None
    gpu_bytes: int | None = None


class Metered(Protocol):
    """The servers of a comparison."""

    def reading(self, name: str) -> Reading:
        """Of the server of this contender, now."""
        ...


class Meter:
    """Made before a visit; `read` says what it took."""

    def __init__(self, servers: Metered, name: str, endpoint: Endpoint, moves: dict[str, int]) -> None:
        self._servers, self._name, self._endpoint, self._moves = servers, name, endpoint, moves
        self._before, self._began = servers.reading(name), time.perf_counter()

    @classmethod
    async def start(cls, servers: Metered, name: str, endpoint: Endpoint) -> Meter:
        """From here on."""
        return cls(servers, name, endpoint, await endpoint.moves())

    async def read(self) -> tuple[Usage, float]:
        """What the visit took, and how many cores the servers beside it used."""
        after, seconds = self._servers.reading(self._name), time.perf_counter() - self._began
        before = self._before
        moves = await self._endpoint.moves()
        made = {why: count - self._moves.get(why, 0) for why, count in moves.items()}
        usage = Usage(
            _more(before.cpu, after.cpu),
            _more(before.joules, after.joules),
            after.gpu_bytes,
            {why: count for why, count in made.items() if count > 0},
        )
        return usage, (after.beside - before.beside) / seconds


def _more(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
