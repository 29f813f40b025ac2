"""The server's end of one engine core: vLLM's own client, with calls that never wait."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any, TypeAlias

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, core_client
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from taichi_serve.cluster.vllm.curve import through
from taichi_serve.cluster.vllm.server.line import DRESSES
from taichi_serve.cluster.vllm.server.process import Process

Outputs: TypeAlias = EngineCoreOutputs | Exception

# Seconds that an engine core which is up may take to reach its client. vLLM's own is that of a whole start.
core_client.VLLM_ENGINE_READY_TIMEOUT_S = 60
through(core_client, DRESSES.get)


class Inbox:
    """Stands where vLLM's client keeps its output queue, and hands every item on at once."""

    def __init__(self, receive: Callable[[Outputs], None]) -> None:
        self.put_nowait = receive


class InstanceClient(AsyncMPClient):
    """vLLM's client of one engine core that runs in a process of ours.

    It is made in a thread, because vLLM's constructor waits for the engine core, and a core may die just then
    while others serve; `listen` then makes it known to the event loop. vLLM's client waits for the socket in
    a coroutine; zmq takes the message at once, so `add`, `abort` and `tell` are plain calls and keep their
    order.
    """

    def __init__(self, config: VllmConfig, process: Process, receive: Callable[[Outputs], None]) -> None:
        super().__init__(
            copy.deepcopy(config),  # the engine's answer (blocks, lengths) is written into it
            Executor.get_class(config),
            True,
            client_addresses={
                "input_address": process.addresses.inputs[0],
                "output_address": process.addresses.outputs[0],
            },
        )
        self.process = process
        self.outputs_queue = Inbox(receive)
        self._told: set[asyncio.Task[Any]] = set()

    def listen(self) -> None:
        """Take outputs from now on, in the event loop that is running."""
        self._ensure_output_queue_task()

    @property
    def dead(self) -> bool:
        """Whether nothing can be sent any more."""
        return bool(self.resources.engine_dead)

    @property
    def kv_capacity(self) -> int:
        """Tokens its KV cache holds (one block is vLLM's own)."""
        cache = self.vllm_config.cache_config
        return int((cache.num_gpu_blocks - 1) * cache.block_size)

    def add(self, request: EngineCoreRequest) -> None:
        """Send a request."""
        request.client_index = self.client_index
        self._send_input(EngineCoreRequestType.ADD, request)

    def abort(self, request_ids: list[str]) -> None:
        """End requests; nothing comes back for them."""
        if not self.dead:
            self._send_input(EngineCoreRequestType.ABORT, request_ids)

    def tell(self, method: str, *args: Any) -> None:
        """Call a method of the engine core and forget its answer."""
        if self.dead:
            return
        task = asyncio.ensure_future(self.call_utility_async(method, *args))
        self._told.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._told.discard(task)
        if not task.cancelled():
            task.exception()  # an engine that died in between is noticed elsewhere

    def fail(self) -> None:
        """The engine core is gone: nothing is sent any more, and whoever waits for an answer is told so."""
        self.resources.engine_dead = True
        for answer in self.utility_results.values():
            if not answer.done():
                answer.set_exception(EngineDeadError())
        self.utility_results.clear()

    def close(self) -> None:
        """Close the sockets, with their threads; the process is ended by its own owner."""
        self.fail()
        for task in self._told:
            task.cancel()
        self.outputs_queue = Inbox(lambda item: None)
        self.process.line.contacts.close()
        self.shutdown()
        self.resources.ctx.destroy(linger=0)
