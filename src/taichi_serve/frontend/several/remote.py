"""The front end's side of the line: a cluster that is in another process."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from typing import Any, NoReturn

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError

from taichi_serve.classes import PLAIN, Terms
from taichi_serve.cluster.vllm.server.blocks import Hasher
from taichi_serve.frontend.client import ClusterClient
from taichi_serve.frontend.names import Asked
from taichi_serve.frontend.series import Left
from taichi_serve.frontend.several.line import Line
from taichi_serve.frontend.several.words import (
    Abandoned,
    Answer,
    Declined,
    Failed,
    Instance,
    Note,
    Outputs,
    Ping,
    Pong,
    Question,
    Standing,
    Submitted,
    Welcome,
)
from taichi_serve.frontend.terms import noted
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.messages import Decline


class RemoteCluster:
    """What a front end's engine client takes for the cluster (client.py), and for who keeps it
    (attendance.py)."""

    def __init__(self, line: Line, standing: Standing, hasher: Hasher | None) -> None:
        self.standing = standing
        self.drained = 0.0  # seconds, as of the last Ping
        self.hasher = hasher
        self.journeys: dict[str, None] = {}  # requests that are open, in order
        self.supervisor = self
        self._line = line

    @property
    def engines(self) -> tuple[Instance, ...]:
        """How the instances stand."""
        return self.standing.instances

    @property
    def silent(self) -> list[Instance]:
        """Those that do not answer."""
        return [instance for instance in self.engines if instance.silent]

    def retry_after(self, at: float) -> int | None:
        """Whole seconds until an instance is expected back, at least 1; None where none will come."""
        back_at = self.standing.back_at
        return None if back_at is None else max(1, math.ceil(back_at - at))

    async def blocks(self, request: EngineCoreRequest) -> tuple[int, ...]:
        """Hashes of the full blocks of a prompt; none where nobody would ask for them."""
        return () if self.hasher is None else await self.hasher.of(request)

    def accept(self, request: EngineCoreRequest, blocks: tuple[int, ...], terms: Terms) -> NoReturn:
        """Requests are submitted, with what belongs to them."""
        raise NotImplementedError

    def submit(self, request: EngineCoreRequest, blocks: tuple[int, ...], terms: Terms, asked: Asked) -> None:
        """A new request of a user. Raises TypeError where it cannot be sent."""
        word = Submitted(asked.number, asked.id, blocks, terms.slo, terms.slo_class)
        self._line.send(word, request)
        self.journeys[request.request_id] = None

    def abandon(self, request_id: str, cancelled: bool) -> None:
        """Nobody wants the rest."""
        if request_id in self.journeys:
            del self.journeys[request_id]
            self._line.send(Abandoned(request_id, cancelled))

    def over(self, request_id: str) -> None:
        """It ended by itself."""
        self.journeys.pop(request_id, None)


class RemoteClient(ClusterClient):
    """vLLM's client port over a cluster in another process. What that one says is in `hear`."""

    cluster: RemoteCluster

    def __init__(self, cluster: RemoteCluster, line: Line) -> None:
        super().__init__(cluster, asyncio.Queue())
        self.came: Callable[[int], None] = lambda index: None
        self.failed: Callable[[str, str], None] = lambda request, why: None
        self.declined: Callable[[Decline], None] = lambda decline: None
        self._line = line
        self._numbers = itertools.count()
        self._questions: dict[int, asyncio.Future[list[Any]]] = {}

    def _accept(self, request: EngineCoreRequest, blocks: tuple[int, ...], asked: Asked) -> None:
        self.cluster.submit(request, blocks, noted() or PLAIN, asked)

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        number = next(self._numbers)
        self._line.send(Question(number, method, list(args)))
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        return await answer

    async def listen(self) -> None:
        """Take what the scheduler's process says, for ever."""
        while True:
            self.take(*await self._line.hear())

    def take(self, word: Any, follows: Any = None) -> None:
        """Take one word."""
        match word:
            case Outputs():
                self._outputs(follows)
            case Failed(request=request, why=why):
                self.cluster.over(request)
                self.failed(request, why)
            case Declined(request=request, retry_after=retry_after):
                self.cluster.over(request)
                self.declined(Decline(request, retry_after, ""))
            case Standing():
                here = {instance.index for instance in word.instances}
                gone = {instance.index for instance in self.cluster.engines} - here
                self.cluster.standing = word
                for index in here:
                    self.came(index)
                for index in gone:
                    self.outputs.put_nowait(Left(index))
            case Answer():
                self._answered(word)
            case Ping(drained=drained):
                self.cluster.drained = drained
                self._line.send(Pong())

    def _outputs(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self.cluster.over(output.request_id)
        self.outputs.put_nowait(outputs)

    def _answered(self, answer: Answer) -> None:
        asked = self._questions.pop(answer.number, None)
        if asked is None or asked.done():
            return
        if answer.wrong is None:
            asked.set_result(answer.result)
        elif answer.wrong.startswith(EngineDeadError.__name__):
            asked.set_exception(EngineDeadError())
        else:
            asked.set_exception(RuntimeError(answer.wrong))


class RemoteTrouble(Trouble):
    """What fails beside serving here is counted where the metrics are."""

    def __init__(self, line: Line) -> None:
        super().__init__(lambda text: None)
        self._line = line

    def note(self, what: str, wrong: BaseException | str) -> None:
        """Something of this kind failed."""
        super().note(what, wrong)
        self._line.send(Note(what, str(wrong) or type(wrong).__name__))


def fitted(config: VllmConfig, welcome: Welcome) -> VllmConfig:
    """The configuration with what the engines found out: it is written into this one."""
    for name, value in welcome.cache.items():
        setattr(config.cache_config, name, value)
    config.model_config.max_model_len = welcome.max_model_len
    return config
