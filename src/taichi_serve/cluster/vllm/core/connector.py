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

from taichi_serve.cluster.vllm.core.fetches import no_more
from taichi_serve.cluster.vllm.core.groups import stays
from taichi_serve.cluster.vllm.core.marks import marks_of
from taichi_serve.cluster.vllm.core.reads import Reads
from taichi_serve.cluster.vllm.nothing import NOTHING, is_nothing
from taichi_serve.cluster.vllm.sockets import dress_peers
from taichi_serve.cluster.vllm.wire import (
    Again,
    Given,
    Orders,
    Return,
    TransferParams,
    direct,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorMetadata,
    )
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class FlowConnectorScheduler(NixlPullConnectorScheduler):
    """The scheduler's side of the pull, counting computed tokens instead of prompts."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        # engine id: tokens asked from the source, and when; until it is scheduled
        self.pulled: dict[str, tuple[int, float]] = {}
        self.reads = Reads()
        self.stays = stays(kv_cache_config, vllm_config)  # why no request of this engine moves
        directory = self.vllm_config.kv_transfer_config.get_from_extra_config("taichi_directory", "")
        self.directory = Path(directory) if directory else None
        if self.directory is not None:
            dress_peers(self.directory, engine_id)
        # Requests about to be read for: tokens that are here already, and whether the step reads the others.
        self._known: dict[str, tuple[int, bool]] = {}
        self._direct: set[str] = set()  # engines whose memory every rank here reads directly
        self._arrived: set[str] = set()  # legs copied ahead that have left their source, until scheduled
        self._orders: list[Again | Given | Return] = []  # for the copiers, with the next step

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
        copied ahead gets all of its blocks now, and a prompt that fetches its prefix the blocks of that.
        """
        if wanted := marks_of(request).fetch:
            # The last token is computed in any case, into a block that nobody else has.
            wanted = 0 if self.stays else min(wanted, (request.num_tokens - 1) // self.block_size)
            self._known[request.request_id] = num_computed_tokens, False
            missing = max(0, wanted * self.block_size - num_computed_tokens)
            return missing, missing > 0
        if marks_of(request).ahead:
            self._known[request.request_id] = num_computed_tokens, False
            return request.num_tokens - num_computed_tokens, True
        params = request.kv_transfer_params
        if self.stays or not params or not params.get("do_remote_prefill"):
            return 0, False
        final = min(params["remote_num_tokens"], request.num_tokens - 1)
        missing = max(0, final - num_computed_tokens)
        in_step = missing > 0 and self._is_direct(params["remote_engine_id"])
        if missing:
            self._known[request.request_id] = num_computed_tokens, in_step
        return missing, missing > 0 and not in_step

    def _is_direct(self, engine_id: str) -> bool:
        if engine_id in self._direct:
            return True
        ids = self.engine_id, engine_id
        if self.directory is not None and direct(self.directory, *ids, self.transfer_tp_size):
            self._direct.add(engine_id)
        return engine_id in self._direct

    def directly(self) -> list[str]:
        """Engines whose memory every rank here reads itself, as far as they have met."""
        if self.directory is None:
            return []
        markers = self.directory.glob(f"direct-{self.engine_id}--*--0")
        return [source for path in markers if self._is_direct(source := path.name.split("--")[1])]

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Have the missing blocks read, and remember how much that is."""
        known, in_step = self._known.pop(request.request_id, (0, False))
        lent = bool(marks_of(request).ahead or marks_of(request).fetch)
        no_more(request)
        if not num_external_tokens:
            if not marks_of(request).ahead:
                super().update_state_after_alloc(request, blocks, num_external_tokens)
            return
        given = Given(request.request_id, list(blocks.get_block_ids()[0]), known // self.block_size)
        self.reads.begin(given, lent=lent)
        if lent:
            self._orders.append(given)
            return
        self.pulled[request.request_id] = num_external_tokens, time.monotonic()
        if in_step:
            self._read_within_step(request, given, known + num_external_tokens)
        else:
            super().update_state_after_alloc(request, blocks, num_external_tokens)

    def _read_within_step(self, request: Request, given: Given, tokens: int) -> None:
        # vLLM's own would have the request wait, and send heartbeats for it meanwhile.
        missing = (given.blocks[given.first : -(-tokens // self.block_size)],)
        assert request.kv_transfer_params is not None
        self._reqs_need_recv[request.request_id] = (request, missing, (given.first,), False)
        request.kv_transfer_params["do_remote_prefill"] = False
        self._stop_heartbeat(request.request_id)

    def arrive(self, request: Request, began: float) -> bool:
        """The source made the last token of a leg that was copied ahead: its last blocks will be here for the
        step that it is in. False where none were given to it."""
        given = self.reads.lent(request.request_id)
        if given is None:
            return False
        pulled = request.num_tokens - 1 - given.first * self.block_size
        self.pulled[request.request_id] = max(0, pulled), began
        self._arrived.add(request.request_id)
        return True

    def taken_in(self, leg: str, good: bool, alive: bool) -> None:
        """The outputs of the step that read the leg, or that waited for its last blocks, are known. Blocks
        that are lent are the request's own now if they are `good` and it is still `alive`; else they come
        back with the copiers' word."""
        if self.reads.lent(leg) is None or (good and alive):
            self.reads.over(leg)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """vLLM's own, with the orders for the threads that copy beside the steps, and the legs whose last
        blocks this step waits for: the one that computes them, none before."""
        meta = super().build_connector_meta(scheduler_output)
        here = [leg for leg in self._arrived if leg in scheduler_output.num_scheduled_tokens]
        self._arrived.difference_update(here)
        awaited = [given for leg in here if (given := self.reads.lent(leg)) is not None]
        if awaited:  # workers look after loads before the step's own work only if there are such
            scheduler_output.has_sync_kv_loads = True
        orders, self._orders = Orders(self._orders, awaited), []
        if is_nothing(meta, orders):
            return NOTHING
        meta.taichi = orders
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """vLLM's own; and what was being read for these legs, or lent to the copiers, is over."""
        super().update_connector_output(connector_output)
        for leg in connector_output.finished_recving or ():
            self.reads.over(leg)

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, TransferParams | None]:
        """Pin the blocks of a request that leaves; free those of every other one at once, but for those that
        somebody still writes into."""
        self.pulled.pop(request.request_id, None)
        self._known.pop(request.request_id, None)
        self._arrived.discard(request.request_id)
        if self.reads.lent(request.request_id) is not None:
            self._orders.append(Return(request.request_id))
            return True, None
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

    def again(self) -> None:
        """The server is another one: the copiers hear of it with the next step."""
        self._orders.append(Again())

    def never_read(self, request: Request) -> None:
        """Nothing has been read for a request that waits, and nothing will be. Its source hears of it from
        the server: vLLM's own would tell it that its blocks were read."""
        if request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False
            self._stop_heartbeat(request.request_id)

    def release(self, request_id: str) -> None:
        """Have the workers give back the blocks of a request that left: nobody will read them. The time is
        long past, so they do it with the next step."""
        self._reqs_need_send[request_id] = time.perf_counter() - 1.0
