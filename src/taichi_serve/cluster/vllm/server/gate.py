"""Stands between the scheduler and the cluster, and holds commands back that quarantine.py wants to wait.

It sees every fact and every decision, so it needs to know nothing of how requests are carried out. While
there are no suspects it costs one look at an empty dictionary for each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from taichi_serve.cluster.base import Cluster
from taichi_serve.cluster.vllm.server.quarantine import Quarantine
from taichi_serve.messages import (
    Abort,
    Command,
    Decline,
    Event,
    Finished,
    Flowed,
    Lost,
    Outcome,
    Prefilled,
    Removed,
    Stepped,
)


class Gate:
    """A cluster in front of a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        quarantine: Quarantine,
        declined: Callable[[Decline], object] = lambda decline: None,
    ) -> None:
        """`declined` tells a user that the request is turned away."""
        self._cluster = cluster
        self._declined = declined
        self._quarantine = quarantine
        self._at: dict[str, str] = {}  # suspects that have made a token: on which instance

    async def events(self) -> AsyncIterator[Event]:
        """The cluster's facts. What may go on because of one is sent before the scheduler hears of it."""
        async for event in self._cluster.events():
            if self._quarantine:
                for command in self._hear(event):
                    self._cluster.send(command)
            yield event

    def send(self, command: Command) -> None:
        """Carry a decision out, or keep it until its turn. Who is turned away is told so first."""
        if isinstance(command, Decline):
            self._declined(command)
            self._cluster.send(Abort(command.request, Outcome.REFUSED, command.why))
            return
        if not self._quarantine or self._quarantine.admit(command):
            self._cluster.send(command)

    def _hear(self, event: Event) -> list[Command]:
        quarantine = self._quarantine
        match event:
            case Prefilled(request=request, instance=instance) | Flowed(request=request, instance=instance):
                self._at[request] = instance
                return self._released([request])
            case Stepped(instance=instance, missed=missed):
                here = [name for name, at in self._at.items() if at == instance and name not in missed]
                return self._released(here)
            case Lost(instance=instance) | Removed(instance=instance):
                self._at = {name: at for name, at in self._at.items() if at != instance}
            case Finished(request=request):
                self._at.pop(request, None)
                return quarantine.over(request)
        return []

    def _released(self, made: list[str]) -> list[Command]:
        commands = [command for name in made for command in self._quarantine.made(name)]
        self._at = {name: at for name, at in self._at.items() if name in self._quarantine.suspects}
        return commands
