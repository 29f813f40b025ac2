"""The engine core's side of a move: which blocks are pulled, which stay pinned, with exact block arithmetic.

Between instances on one host the bytes do not take NIXL's way (host.py). Most of them come before the request
does, copied beside the steps (copier.py).

A request leaves an instance after token T (prompt and output counted together). The KV of its first T - 1
tokens is final there; token T is the one the next instance computes, which yields token T + 1. The stock
connector counts in whole prompts instead; this subclass counts what was really computed and trims the block
list to it, so that both sides agree block by block.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

from taichi_serve.cluster.vllm.core.marks import marks_of
from taichi_serve.cluster.vllm.wire import Given, Orders, Return, TransferParams, direct

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorMetadata,
    )
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class FlowConnectorScheduler(NixlPullConnectorScheduler):
    """The scheduler's side of the pull, counting computed tokens instead of prompts."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        # engine id: tokens asked from the source, and when; until it is scheduled
        self.pulled: dict[str, tuple[int, float]] = {}
        directory = self.vllm_config.kv_transfer_config.get_from_extra_config("taichi_directory", "")
        self._directory = Path(directory) if directory else None
        self._known: dict[str, int] = {}  # requests about to be read for: tokens that are here already
        self._direct: set[str] = set()  # engines whose memory every rank here reads directly
        self._ahead: dict[
            str, Given
        ] = {}  # legs whose KV is copied beside the steps, until they are scheduled
        self._orders = Orders()  # for the workers, with the next step

    def set_xfer_handshake_metadata(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Listen for peers, once. Raises OSError where the side channel's port is taken: vLLM's own would
        wait for its listener for ever."""
        if self._nixl_handshake_listener_t is None:
            self._can_listen()
        super().set_xfer_handshake_metadata(metadata)

    def _can_listen(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.side_channel_host, self.side_channel_port))
                probe.listen()
            except OSError as taken:
                where = f"{self.side_channel_host}:{self.side_channel_port}"
                raise OSError(taken.errno, f"the KV side channel cannot listen on {where}") from taken

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens to pull beyond `num_computed_tokens`, and whether to wait for them outside the step.

        What a peer on this host holds is read at the beginning of the very step that needs it. A leg that is
        copied ahead gets all of its blocks now.
        """
        if marks_of(request).ahead:
            self._known[request.request_id] = num_computed_tokens
            return request.num_tokens - num_computed_tokens, True
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return 0, False
        final = min(params["remote_num_tokens"], request.num_tokens - 1)
        missing = max(0, final - num_computed_tokens)
        in_step = missing > 0 and self._is_direct(params["remote_engine_id"])
        if in_step:
            self._known[request.request_id] = num_computed_tokens
        return missing, missing > 0 and not in_step

    def _is_direct(self, engine_id: str) -> bool:
        if len(self.kv_cache_config.kv_cache_groups) > 1:
            return False  # a failed read could not be told apart by block
        if engine_id in self._direct:
            return True
        ids = self.engine_id, engine_id
        if self._directory is not None and direct(self._directory, *ids, self.transfer_tp_size):
            self._direct.add(engine_id)
        return engine_id in self._direct

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Have the missing blocks read, and remember how much that is."""
        known = self._known.pop(request.request_id, None)
        if marks_of(request).ahead:
            if known is not None:
                first = known // self.block_size
                given = Given(request.request_id, list(blocks.get_block_ids()[0]), first)
                self._ahead[request.request_id] = given
                self._orders.copier.append(given)
            return
        if num_external_tokens:
            self.pulled[request.request_id] = num_external_tokens, time.monotonic()
        if known is None or not num_external_tokens:
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            return
        # vLLM's own would look for blocks without a hash, and those of a request in this step have theirs.
        first, last = known // self.block_size, -(-(known + num_external_tokens) // self.block_size)
        missing = tuple(list(group)[first:last] for group in blocks.get_block_ids())
        computed = tuple(first for _ in missing)
        # Nobody waits for it (the False), and its lease ends with the step.
        wanted = self.get_exchange_clipped_blocks(missing)
        self._reqs_need_recv[request.request_id] = (request, wanted, computed, False)
        assert request.kv_transfer_params is not None
        request.kv_transfer_params["do_remote_prefill"] = False
        self._stop_heartbeat(request.request_id)

    def arrive(self, request: Request, began: float) -> bool:
        """The source made the last token of a leg that was copied ahead: its last blocks will be here for the
        next step. False where none were given to it."""
        given = self._ahead.get(request.request_id)
        if given is None:
            return False
        pulled = request.num_tokens - 1 - given.first * self.block_size
        self.pulled[request.request_id] = max(0, pulled), began
        self._orders.awaited.append(given)
        return True

    def scheduled(self, request_id: str) -> None:
        """A leg that was copied ahead is in a step: from here on it is like any other."""
        self._ahead.pop(request_id, None)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """vLLM's own, with the orders for the threads that copy beside the steps."""
        meta = super().build_connector_meta(scheduler_output)
        if self._orders.awaited:  # workers look after loads before the step's own work only if there are such
            scheduler_output.has_sync_kv_loads = True
        meta.taichi, self._orders = self._orders, Orders()
        return meta

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, TransferParams | None]:
        """Pin the blocks of a request that leaves; free those of every other one at once, but for those that
        somebody still writes into."""
        if (given := self._ahead.pop(request.request_id, None)) is not None:
            self._orders.copier.append(Return(request.request_id))
            self._orders.awaited = [one for one in self._orders.awaited if one is not given]
            return True, None
        self.pulled.pop(request.request_id, None)
        self._known.pop(request.request_id, None)
        leaves = bool((request.kv_transfer_params or {}).get("do_remote_decode"))
        pinned, params = super().request_finished(request, block_ids)
        if not (leaves and pinned and params):
            return pinned, params
        final = request.num_tokens - 1
        blocks = -(-final // self.block_size)
        params["remote_block_ids"] = tuple(list(group)[:blocks] for group in params["remote_block_ids"])
        params["remote_num_tokens"] = final
        return pinned, params

    def leave(self, request: Request) -> None:
        """Mark a request so that its blocks stay pinned for a reader when it stops in this step."""
        request.kv_transfer_params = {"do_remote_decode": True}
        # The worker only accepts a reader's "done" for requests it saw in a batch.
        self._reqs_in_batch.add(request.request_id)

    def release(self, request_id: str) -> None:
        """Let the lease of a request that left end now: nobody will read its blocks."""
        self._reqs_need_send[request_id] = time.perf_counter() - 1.0
