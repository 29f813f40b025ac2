"""What vLLM's routes may ask of its engine beside requests: done on every instance alike, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, NoReturn

from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError

from taichi_serve.cluster.vllm.server.cluster import VllmCluster


async def _not_here(*_: Any, **__: Any) -> NoReturn:
    """Whatever way leads here: vLLM's server answers this error with 501."""
    raise NotImplementedError("This cannot be done on several instances at once.")


async def everywhere(cluster: VllmCluster, method: str, *args: Any) -> list[Any]:
    """What this method of vLLM's client answers on each instance that lives."""
    clients = [engine.client for engine in cluster.engines if engine.alive]
    if not clients:
        raise EngineDeadError()
    return await asyncio.gather(*(getattr(client, method)(*args) for client in clients))


class Everywhere(EngineCoreClient):
    """The part of vLLM's client port that concerns every instance alike."""

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """What this method answers on each instance."""
        raise NotImplementedError

    async def get_supported_tasks_async(self) -> Any:
        """The tasks of the model, the same on every instance."""
        return (await self._everywhere("get_supported_tasks_async"))[0]

    async def reset_mm_cache_async(self) -> None:
        """Forget multimodal inputs, everywhere."""
        await self._everywhere("reset_mm_cache_async")

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget cached prefixes, everywhere."""
        return all(
            await self._everywhere("reset_prefix_cache_async", reset_running_requests, reset_connector)
        )

    async def reset_encoder_cache_async(self) -> None:
        """Forget encoder outputs, everywhere."""
        await self._everywhere("reset_encoder_cache_async")

    async def profile_async(self, *args: Any, **kwargs: Any) -> None:
        """Start or stop vLLM's profiler, everywhere."""
        await self._everywhere("profile_async", *args, *kwargs.values())

    async def add_lora_async(self, lora_request: Any) -> bool:
        """Load an adapter, everywhere."""
        return all(await self._everywhere("add_lora_async", lora_request))

    async def remove_lora_async(self, lora_id: int) -> bool:
        """Unload an adapter, everywhere."""
        return all(await self._everywhere("remove_lora_async", lora_id))

    async def list_loras_async(self) -> set[int]:
        """The adapters that every instance has."""
        found: list[Iterable[int]] = await self._everywhere("list_loras_async")
        return set.intersection(*map(set, found))

    async def pin_lora_async(self, lora_id: int) -> bool:
        """Keep an adapter loaded, everywhere."""
        return all(await self._everywhere("pin_lora_async", lora_id))

    async def get_weight_version_async(self) -> Any:
        """The version of the weights, the same on every instance."""
        return (await self._everywhere("get_weight_version_async"))[0]

    async def is_scheduler_paused_async(self) -> bool:
        """Instances are never paused."""
        return False

    async def is_sleeping_async(self) -> bool:
        """Instances never sleep."""
        return False

    async def collective_rpc_async(
        self, method: Any, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        """Call the workers of every instance."""
        answers = await self._everywhere("collective_rpc_async", method, timeout, args, kwargs)
        return [answer for instance in answers for answer in instance]

    # The guard refuses the routes that ask for these (elsewhere.py).
    pause_scheduler_async = resume_scheduler_async = _not_here
    pause_generation_async = abort_external_elastic_ep = _not_here  # asked for since vLLM 0.33
    sleep_async = wake_up_async = release_kv_cache_memory_async = _not_here
    set_weight_version_async = compute_weight_checksums_async = _not_here
    prepare_elastic_ep = commit_elastic_ep = _not_here
    handle_fault = get_status = save_sharded_state_async = execute_dummy_batch_async = _not_here

    def dp_engines_running(self) -> bool:
        """Data-parallel engines: there are none."""
        return False
