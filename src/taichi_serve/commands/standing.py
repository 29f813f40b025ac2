"""The servers of a comparison. All stay up where memory allows: an idle one costs next to nothing, and
a visit begins at once. Where it does not allow it one at a time is up, and every visit starts its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from rich.console import Console

from taichi_serve.bench.endpoint import Endpoint, EndpointGoneError, meet
from taichi_serve.commands.contenders import Contender
from taichi_serve.commands.family import available, cpu_seconds
from taichi_serve.commands.gpus import Gpus
from taichi_serve.commands.metering import Reading
from taichi_serve.commands.proxied import ProxiedServers
from taichi_serve.commands.stock import StockServer, stock_environment
from taichi_serve.commands.subserver import ServerError, Subserver

ROOM = 1.2  # a server must leave so much more free than the largest one before it took


class Standing:
    """Starts and stops them. Whoever makes one calls `stop` at the end, however it comes."""

    def __init__(
        self,
        contenders: Mapping[str, Contender],
        model: str,
        api_key: str | None,
        console: Console,
        at_once: bool = False,
    ) -> None:
        """`at_once`: the first that is met starts all of them. What the start of each took of the memory is
        not known then."""
        self._contenders, self._model, self._api_key = contenders, model, api_key
        self._console, self._at_once = console, at_once
        self._begun: dict[str, Subserver] = {}  # started, and not known to be ready
        self._up: dict[str, Subserver] = {}
        self._largest = 0  # bytes
        self._gpus = Gpus.find()
        self._gpu_bytes: dict[str, int | None] = {}  # what the start of each one took
        self.alone = False  # one at a time

    async def meet(self, name: str) -> AbstractAsyncContextManager[Endpoint]:
        """A contender, up and ready. ServerError says why it cannot be."""
        return meet(await self._url(name), self._api_key)

    def reading(self, name: str) -> Reading:
        """What the server of a contender has used so far, the servers beside it, and the GPUs."""
        used = {one: cpu_seconds(server.pid) for one, server in self._up.items()}
        own = used.pop(name, None)
        return Reading(own, sum(used.values()), self._gpus.joules(), self._gpu_bytes.get(name))

    def stop(self, failed: str | None = None) -> None:
        """Stop all; the log of one that failed stays."""
        for servers in (self._begun, self._up):
            for name in list(servers):
                servers.pop(name).stop(keep=name == failed)

    def log(self, name: str) -> str:
        """Where the log of a contender is."""
        server = self._up.get(name)
        return f"\nits log is {server.log}" if server else ""

    async def _url(self, name: str) -> str:
        contender = self._contenders[name]
        if contender.kind == "url":
            return contender.url
        if (server := self._up.get(name)) is not None:
            if (code := server.ended) is not None:
                raise EndpointGoneError(f"its server has ended with exit code {code}")
            return server.url
        if self._at_once and not self.alone:
            self._begin()
        elif not self.alone and self._up and available() < ROOM * self._largest:
            self._go_alone(f"there is no memory for {name} beside the others")
        if self.alone:
            self.stop()
        others = bool(self._up or self._begun.keys() - {name})
        try:
            return await self._start(contender, keep=not others)
        except ServerError as wrong:
            if not others:
                raise
            self._go_alone(f"{name} does not start beside the others ({wrong})")
        return await self._start(contender, keep=True)

    def _begin(self) -> None:
        """Start whoever is not up."""
        for name, one in self._contenders.items():
            if one.kind != "url" and not (name in self._begun or name in self._up):
                self._begun[name] = _server(one, [self._model, *one.flags])

    def _go_alone(self, why: str) -> None:
        self._console.print(f"{why}: from now on one server at a time is up", soft_wrap=True, markup=False)
        self.alone = True
        self.stop()

    async def _start(self, contender: Contender, keep: bool) -> str:
        """`keep` says whether the log stays where it fails."""
        before, name, graphics = available(), contender.name, self._gpus.used()
        begun = self._begun.pop(name, None)
        self._up[name] = server = begun or _server(contender, [self._model, *contender.flags])
        try:
            with self._console.status(f"{name}: starting the server") as status:
                async for said in server.sayings():
                    status.update(f"{name}: {said}")
        except ServerError as wrong:
            self._up.pop(name).stop(keep)
            raise ServerError(f"{name}: {wrong}" + (f"\nits log is {server.log}" if keep else "")) from None
        if begun:
            return server.url
        self._largest = max(self._largest, before - available())
        now = self._gpus.used()
        self._gpu_bytes[name] = None if graphics is None or now is None else now - graphics
        return server.url


def _server(contender: Contender, words: list[str]) -> Subserver:
    """What a contender is, beginning to start."""
    if contender.kind == "stock":
        return StockServer(words, stock_environment(contender.instances))
    if contender.kind == "proxied":
        return ProxiedServers(words)
    return Subserver(words)
