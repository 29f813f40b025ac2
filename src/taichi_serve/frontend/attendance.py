"""Who of the instances is there, in the words of the HTTP server: what a client is told while none is."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm.exceptions import GracefulHTTPError

if TYPE_CHECKING:
    from taichi_serve.cluster.vllm.server.cluster import VllmCluster
    from taichi_serve.cluster.vllm.server.keeper import Keeper


class Attendance:
    """Looks at the cluster and at who brings its instances back."""

    def __init__(self, cluster: VllmCluster, keeper: Keeper) -> None:
        self._cluster = cluster
        self._keeper = keeper

    def none_lives(self) -> bool:
        """Whether no instance can take a request."""
        return not any(engine.alive for engine in self._cluster.engines)

    def none_answers(self) -> bool:
        """Whether every instance is lost or silent."""
        return not any(e.alive and e not in self._keeper.silent for e in self._cluster.engines)

    def retry_after(self) -> int | None:
        """Whole seconds until an instance is expected back, where none lives and one is."""
        return self._keeper.supervisor.retry_after(time.monotonic()) if self.none_lives() else None

    def refusal(self) -> GracefulHTTPError:
        """What a request is told while none lives."""
        return GracefulHTTPError(self._words(), HTTPStatus.SERVICE_UNAVAILABLE)

    def unready(self) -> str | None:
        """Why no instance takes a request now; None where one does."""
        if self.none_lives():
            return self._words()
        return "No instance answers at present." if self.none_answers() else None

    def _words(self) -> str:
        seconds = self.retry_after()
        when = "none will come back" if seconds is None else f"one is expected back in about {seconds} s"
        return f"No instance is up; {when}."
