"""The engine client that vLLM's own API server is built around: one engine in its eyes, several in fact.

vLLM's AsyncLLM keeps its input and output processing (chat templates, detokenising, stop strings, logprobs,
statistics); only the client below it is ours. What users get to see never tells instances apart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol, cast

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason, async_llm
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from taichi_serve.classes import PLAIN, Terms
from taichi_serve.cluster.vllm.server.cluster import VllmCluster
from taichi_serve.frontend import internal
from taichi_serve.frontend.attendance import Attendance
from taichi_serve.frontend.attendance import Cluster as Attended
from taichi_serve.frontend.errors import SHUTTING_DOWN
from taichi_serve.frontend.everywhere import Everywhere, everywhere
from taichi_serve.frontend.names import Asked, Names, not_taken
from taichi_serve.frontend.series import Left, of_known, one_fewer, one_more
from taichi_serve.frontend.terms import noted
from taichi_serve.frontend.traced import Traces, set_defaults
from taichi_serve.frontend.trouble import Trouble
from taichi_serve.frontend.turned_away import OVERLOADED
from taichi_serve.messages import Decline

_cancelling: ContextVar[bool] = ContextVar("cancelling", default=False)


class Cluster(Attended, Protocol):
    """What a front end needs of the cluster, which may be in another process."""

    @property
    def journeys(self) -> Iterable[str]:
        """Requests that are open."""
        ...

    async def blocks(self, request: EngineCoreRequest) -> tuple[int, ...]:
        """Hashes of the full blocks of a prompt."""
        ...

    def accept(self, request: EngineCoreRequest, blocks: tuple[int, ...], terms: Terms) -> None:
        """A new request of a user."""
        ...

    def abandon(self, request_id: str, cancelled: bool) -> None:
        """Nobody wants the rest of it."""
        ...


class _Resources:
    """What AsyncLLM asks for its health: dead only when every instance is."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @property
    def engine_dead(self) -> bool:
        return not any(engine.alive for engine in self._cluster.engines)


class ClusterClient(Everywhere):
    """vLLM's client port over a whole cluster."""

    tracing: Traces | None = None  # where there are traces, who is told of each request
    left: Callable[[int], object] = staticmethod(lambda index: None)

    def __init__(self, cluster: Cluster, outputs: asyncio.Queue[EngineCoreOutputs | Left]) -> None:
        self.cluster = cluster
        self.resources = _Resources(cluster)
        self.engine_ranks_managed = [engine.index for engine in cluster.engines]
        self.outputs = outputs
        self.names = Names()
        self.coming: set[str] = set()  # requests whose prompts are being hashed

    async def get_output_async(self) -> EngineCoreOutputs:
        """The users' outputs of one step of one instance. Whoever asks has recorded all before."""
        while isinstance(outputs := await self.outputs.get(), Left):
            self.left(outputs.index)
        return outputs

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Give a request to the cluster; the scheduler decides where it goes."""
        if self.tracing is not None:
            self.tracing.entered(request)
        request_id = request.request_id
        asked = self.names.note(request_id, request.external_req_id or request_id)
        self.coming.add(request_id)
        try:
            blocks = await self.cluster.blocks(request)
            if request_id in self.coming:  # else it was ended while a long prompt was hashed
                self._accept(request, blocks, asked)
        finally:
            self.coming.discard(request_id)

    def _accept(self, request: EngineCoreRequest, blocks: tuple[int, ...], asked: Asked) -> None:
        self.cluster.accept(request, blocks, noted() or PLAIN)

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        return await everywhere(cast(VllmCluster, self.cluster), method, *args)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """End requests wherever they are: because the client left, or because a stop string was found."""
        for request_id in request_ids:
            self.coming.discard(request_id)
            self.cluster.abandon(request_id, cancelled=_cancelling.get())

    def shutdown(self, timeout: float | None = None) -> None:
        """Processes belong to the server (server.py), which ends them after the last output."""


class ClusterLLM(async_llm.AsyncLLM):
    """vLLM's AsyncLLM over a cluster: it refuses what only this system may say, and tells why it aborts."""

    closing = False
    attendance: Attendance
    shutdown_from_thread: Callable[[], None] | None = None

    def shutdown(self, timeout: float | None = None) -> None:
        """Let the open requests end first; vLLM's server calls this in a thread when a signal comes."""
        drain, self.shutdown_from_thread = self.shutdown_from_thread, None
        if drain is not None:
            drain()
        super().shutdown(timeout)

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Add a request; raises a client error where it tries to steer KV transfers or ranks itself."""
        if self.closing:
            raise GracefulHTTPError(SHUTTING_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)
        if self.attendance.none_lives():
            raise self.attendance.refusal()
        if isinstance(params, SamplingParams):
            for name in internal.EXTRA:
                if (params.extra_args or {}).get(name) is not None:
                    raise VLLMValidationError(f"{name} cannot be set by a client", parameter=name)
        if kwargs.get("data_parallel_rank") is not None:
            raise VLLMValidationError("a data-parallel rank cannot be chosen by a client")
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """As vLLM's own, which asks before an answer begins, and again once the prompt is tokenized: who is
        refused only then gets its 503, too (turned_away.py)."""
        try:
            super().check_admission(n, request_id)
        except GracefulHTTPError as full:
            not_taken(full.message)
            raise

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        """As vLLM's own, which notes the request before it waits here: one whose client leaves meanwhile is
        forgotten."""
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            await self.abort(request.request_id, internal=True)
            raise

    @property
    def dead_error(self) -> BaseException:
        """What vLLM's routes say where no instance lives: they ask before they begin a stream."""
        return self.attendance.refusal() if self.attendance.none_lives() else super().dead_error

    async def check_health(self) -> None:
        """Raise where nobody should send requests: none answers, or the server is about to stop."""
        if self.closing or self.attendance.none_answers():
            raise EngineDeadError()
        await super().check_health()

    @property
    def unfinished(self) -> bool:
        """Whether a request is open."""
        return bool(self.output_processor.has_unfinished_requests())

    def behind(self, request_id: str) -> list[list[str]]:
        """See Names.behind."""
        core: ClusterClient = self.engine_core
        return core.names.behind(request_id)

    def added(self, index: int) -> None:
        """An instance of this number takes part: vLLM's statistics are to know it."""
        one_more(self.logger_manager, index)

    def removed(self, index: int) -> None:
        """It left: vLLM's statistics are to forget it, after what is on its way to them."""
        core: ClusterClient = self.engine_core
        core.outputs.put_nowait(Left(index))

    def processes(self) -> list[dict[str, Any]]:
        """It is in the server's own process."""
        return []

    def fail(self, request_id: str, why: str) -> None:
        """End a request with a 500 that says why; in a stream it is the last event."""
        state = self.output_processor.request_states.get(request_id)
        if state is not None and state.queue is not None:
            state.queue.put(GracefulHTTPError(f"{why}.", HTTPStatus.INTERNAL_SERVER_ERROR))
            self.output_processor.abort_requests([request_id], internal=True)

    def decline(self, decline: Decline) -> None:
        """Turn a request away with a 503, before the first byte of its answer (turned_away.py)."""
        core: ClusterClient = self.engine_core
        core.names.turn_away(decline.request, decline.retry_after)
        state = self.output_processor.request_states.get(decline.request)
        if state is not None and state.queue is not None:
            state.queue.put(GracefulHTTPError(OVERLOADED, HTTPStatus.SERVICE_UNAVAILABLE))
            self.output_processor.abort_requests([decline.request], internal=True)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Abort because nobody listens any more."""
        token = _cancelling.set(True)
        try:
            await super().abort(request_id, internal)
        finally:
            _cancelling.reset(token)

    async def notify_kv_transfer_request_rejected(self, *args: Any, **kwargs: Any) -> None:
        """A client's transfer parameters mean nothing here."""

    def reject_rest(self) -> None:
        """End every request that is still open, with what it has got."""
        core: ClusterClient = self.engine_core
        for request_id in [*core.cluster.journeys, *core.coming]:
            end = EngineCoreOutput(request_id, [], finish_reason=FinishReason.ABORT)
            core.outputs.put_nowait(EngineCoreOutputs(outputs=[end]))
            core.coming.discard(request_id)
            core.cluster.abandon(request_id, cancelled=True)

    async def drained(self, timeout: float) -> bool:
        """Wait until nothing is open, at most `timeout` seconds; says whether that came true."""
        until = time.monotonic() + timeout
        while self.unfinished:
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(0.02)
        return True


def drain_from_thread(llm: ClusterLLM, loop: asyncio.AbstractEventLoop) -> None:
    """Let what runs finish, within vLLM's --shutdown-timeout; then end it. New requests get 503 meanwhile.

    vLLM's server calls this in a thread when a signal comes, and closes its connections afterwards.
    """
    asyncio.run_coroutine_threadsafe(_drain(llm), loop).result()


async def _drain(llm: ClusterLLM) -> None:
    llm.closing = True
    if not await llm.drained(float(llm.vllm_config.shutdown_timeout)):
        llm.reject_rest()
        await llm.drained(1.0)


def guard_statistics(llm: ClusterLLM, trouble: Trouble) -> None:
    """What fails in vLLM's statistics would end every stream: it is counted instead."""
    if (statistics := llm.logger_manager) is not None:
        statistics.record = trouble.guarded("statistics", of_known(statistics))
        core: ClusterClient = llm.engine_core
        core.left = trouble.guarded("statistics", partial(one_fewer, statistics))


def cluster_llm(config: VllmConfig, client: ClusterClient, args: Any, **several: Any) -> ClusterLLM:
    """vLLM's AsyncLLM with this client in the place where it makes its own. `several` is what it is told
    where there are other front ends beside it."""
    set_defaults(args)

    class Factory(EngineCoreClient):
        make_async_mp_client = staticmethod(lambda **_: client)

    # AsyncLLM.__init__ asks this name for its client, and has no parameter for another one.
    vllms_own = async_llm.EngineCoreClient
    async_llm.EngineCoreClient = Factory
    try:
        return ClusterLLM(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=not args.disable_log_stats,
            log_requests=args.enable_log_requests,
            aggregate_engine_logging=args.aggregate_engine_logging,
            **several,
        )
    finally:
        async_llm.EngineCoreClient = vllms_own
