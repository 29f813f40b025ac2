"""Who of the instances is there, in the words of the HTTP server: what a client is told while none is."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from http import HTTPStatus
from typing import Any, Protocol

from vllm.exceptions import GracefulHTTPError


class Instance(Protocol):
    """One of them."""

    @property
    def index(self) -> int:
        """Its number."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can take requests."""
        ...


class Cluster(Protocol):
    """All of them."""

    @property
    def engines(self) -> Sequence[Instance]:
        """In order."""
        ...


class Supervisor(Protocol):
    """Who knows when one comes back."""

    def retry_after(self, at: float) -> int | None:
        """Whole seconds until the first is expected to serve; None when that is hopeless."""
        ...


class Keeper(Protocol):
    """Who brings them back."""

    @property
    def supervisor(self) -> Supervisor:
        """Who decides it."""
        ...

    @property
    def silent(self) -> Collection[Any]:
        """Those that do not answer."""
        ...


class Attendance:
    """Looks at the cluster and at who brings its instances back."""

    def __init__(self, cluster: Cluster, keeper: Keeper) -> None:
        self._cluster = cluster
        self._keeper = keeper

    @property
    def silent(self) -> Collection[Any]:
        """The instances that do not answer."""
        return self._keeper.silent

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
