"""KV between instances on one host at memory speed, under the interface of a NIXL agent.

vLLM's connector talks to a NIXL agent in terms of addresses, lengths and indices into prepared lists. This
agent answers the same calls, and where the peer is an instance of ours on this host it reads the peer's
memory itself: over CUDA IPC with one kernel on a stream of its own, or with process_vm_readv from a thread.
Every other peer, and every host that refuses such reads, goes over NIXL as before, pair by pair.

Peers find each other through small files in the server's own directory (mode 0700), so handles are only
given to instances of the same server. A source frees its blocks when the reader says so, as with NIXL. A read
counts only if its source lived on after the last byte: memory of a dead process may be anybody's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from taichi_serve.cluster.vllm.moved import block_rows
from taichi_serve.cluster.vllm.wire import direct_marker, offer_file
from taichi_serve.cluster.vllm.worker.life import Life, born
from taichi_serve.cluster.vllm.worker.locked import Locked

log = logging.getLogger("vllm.taichi.host")

Rows = NDArray[np.uint64]  # (n, 3): address, bytes, device
EARLY_WORDS = 4096  # about requests that are not known yet; who left has no other way to be freed


class Memory(Protocol):
    """One kind of memory: how it is offered to peers, reached at a peer, and copied from there."""

    def offer(self, ranges: Rows) -> list[dict[str, Any]]:
        """What a peer needs to reach these ranges, as JSON."""
        ...

    def reach(self, peer: dict[str, Any], rows: Rows) -> NDArray[np.uint64]:
        """Addresses that `copy` can read for the peer's rows. Raises OSError where the host refuses."""
        ...

    def copy(self, peer: dict[str, Any], target: Rows, source: NDArray[np.uint64], in_step: bool) -> Copy:
        """Start copying source rows to target rows. With `in_step` the work that follows waits for it."""
        ...

    def leave(self, peer: dict[str, Any]) -> None:
        """The peer is gone: let go of its memory."""
        ...


class Copy(Protocol):
    """A copy under way."""

    def done(self) -> bool:
        """Whether every byte is there. Raises OSError where the peer's memory could not be read."""
        ...


@dataclass(slots=True, eq=False)
class Descriptors:
    """Rows on their way into a prepared list, with NIXL's own form of them."""

    rows: Rows
    nixl: Any


@dataclass(slots=True, eq=False)
class Prepared:
    """A prepared list: of our own memory, or of a peer's (then `addresses` is how we reach it)."""

    agent: str
    rows: Rows
    nixl: Any
    addresses: NDArray[np.uint64] | None = None


@dataclass(slots=True, eq=False)
class Transfer:
    """One read from a peer on this host, until its last byte is here and the peer knows."""

    peer: str
    rows: Rows
    source: NDArray[np.uint64]
    note: bytes
    copy: Copy | None = None
    began: float = 0.0
    took: float = 0.0


class HostAgent:
    """A NIXL agent that keeps transfers between instances of one host to itself; without `memory` it keeps
    none.

    Two threads use it: that of the steps, and the one that copies beside them (copier.py).
    """

    def __init__(self, nixl: Any, directory: Path, memory: Memory | None, engine_id: str, rank: int) -> None:
        self._nixl = Locked(nixl)
        self._directory = directory
        self._memory = memory
        self._engine_id = engine_id
        self._rank = rank
        self._thread = threading.local()
        self.knows: Callable[[str], bool] = lambda request: True
        self._early: list[tuple[str, bytes]] = []
        self._peers: dict[str, dict[str, Any]] = {}
        self._lives: dict[str, Life] = {}  # of the peers, by agent
        self._ranges: list[Rows] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nixl, name)  # whatever is not about copying stays NIXL's

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        """Words of readers. One about a request that our worker has not heard of yet is kept for later:
        a reader on this host can be done before the source's own next step."""
        fresh = [(agent, word) for agent, news in self._nixl.get_new_notifs().items() for word in news]
        words, self._early = self._early + fresh, []
        known: dict[str, list[bytes]] = {}
        for agent, word in words:
            request = word.decode().rsplit(":", 1)[0]
            if self.knows(request) or request.startswith("HB"):
                known.setdefault(agent, []).append(word)
            else:
                self._early.append((agent, word))
        del self._early[:-EARLY_WORDS]
        return known

    # ------------------------------------------------------------------------------ meeting the peers

    def get_reg_descs(self, ranges: Any, mem_type: str) -> Any:
        """Remember what is registered; it is what we can offer."""
        self._ranges.append(np.array([[r[0], r[1], r[2]] for r in ranges], dtype=np.uint64))
        return self._nixl.get_reg_descs(ranges, mem_type)

    def register_memory(self, descs: Any, **options: Any) -> Any:
        """Register with NIXL, and leave word for our own instances."""
        registered = self._nixl.register_memory(descs, **options)
        if self._memory is None:
            return registered
        word = {
            "pid": os.getpid(),
            "born": born(),
            "engine_id": self._engine_id,
            "memory": self._memory.offer(np.concatenate(self._ranges)),
        }
        path = self._file(self._nixl.name)
        path.with_suffix(".part").write_text(json.dumps(word))
        path.with_suffix(".part").replace(path)
        return registered

    def add_remote_agent(self, metadata: bytes) -> str:
        """Meet a peer. If it left word here, it is one of ours on this host."""
        name = self._nixl.add_remote_agent(metadata)
        name = name.decode() if isinstance(name, bytes) else str(name)
        path = self._file(name)
        if self._memory is not None and path.exists():
            peer = json.loads(path.read_text())
            try:
                self._lives[name] = Life(peer["pid"], peer.get("born"))
                self._peers[name] = peer
            except OSError as gone:
                log.warning("KV of %s goes over NIXL: %s", peer["engine_id"], gone)
        return name

    def remove_remote_agent(self, agent: str) -> Any:
        """Forget a peer and let go of its memory."""
        self._let_go(agent)
        return self._nixl.remove_remote_agent(agent)

    def forget(self, engine_id: str) -> None:
        """An engine is lost: let go of its memory. Whoever would still read from it fails, and computes
        again."""
        for agent in [name for name, peer in self._peers.items() if peer["engine_id"] == engine_id]:
            self._let_go(agent)

    def _let_go(self, agent: str) -> None:
        if (peer := self._peers.pop(agent, None)) is not None and self._memory is not None:
            self._marker(peer).unlink(missing_ok=True)
            self._memory.leave(peer)
            self._lives.pop(agent).close()

    def _file(self, agent: str) -> Path:
        return offer_file(self._directory, agent)

    def _marker(self, peer: dict[str, Any]) -> Path:
        """The sign for our scheduler, and for /taichi/state, that this peer is read directly."""
        return direct_marker(self._directory, self._engine_id, peer["engine_id"], self._rank)

    # --------------------------------------------------------------------------------- prepared lists

    def get_xfer_descs(self, rows: Any, mem_type: str) -> Descriptors:
        """Keep the rows beside NIXL's form of them."""
        return Descriptors(np.asarray(rows, dtype=np.uint64), self._nixl.get_xfer_descs(rows, mem_type))

    def prep_xfer_dlist(self, agent: str, descs: Any, **options: Any) -> Prepared:
        """Prepare a list, of descriptors or of rows (moved.block_rows); a peer's memory is reached here,
        once."""
        described = isinstance(descs, Descriptors)
        rows, given = (descs.rows, descs.nixl) if described else (block_rows(descs), descs)
        prepared = Prepared(agent, rows, self._nixl.prep_xfer_dlist(agent, given, **options))
        peer = self._peers.get(agent)
        if peer is not None and self._memory is not None:
            try:
                prepared.addresses = self._memory.reach(peer, rows)
                self._marker(peer).touch()
                log.info("KV of %s is read directly", peer["engine_id"])
            except OSError as refused:
                log.warning("KV of %s goes over NIXL: %s", peer["engine_id"], refused)
        return prepared

    def release_dlist_handle(self, prepared: Prepared) -> Any:
        """Let NIXL's own list go."""
        return self._nixl.release_dlist_handle(prepared.nixl)

    # -------------------------------------------------------------------------------------- transfers

    @contextlib.contextmanager
    def within_step(self) -> Iterator[None]:
        """Reads begun in here are there before the step's own work."""
        self._thread.in_step = True
        try:
            yield
        finally:
            self._thread.in_step = False

    def make_prepped_xfer(
        self, way: str, local: Prepared, local_ids: Any, remote: Prepared, remote_ids: Any, **options: Any
    ) -> Any:
        """A read from a peer on this host is ours, every other transfer is NIXL's."""
        if way != "READ" or remote.addresses is None:
            return self._nixl.make_prepped_xfer(
                way, local.nixl, local_ids, remote.nixl, remote_ids, **options
            )
        note = options.get("notif_msg", b"")
        return Transfer(remote.agent, local.rows[local_ids], remote.addresses[remote_ids], note)

    def transfer(self, handle: Any) -> str:
        """Begin."""
        if not isinstance(handle, Transfer):
            return str(self._nixl.transfer(handle))
        handle.began = time.perf_counter()
        assert self._memory is not None  # it gave the addresses
        in_step = getattr(self._thread, "in_step", False)
        handle.copy = self._memory.copy(self._peers[handle.peer], handle.rows, handle.source, in_step)
        return "PROC"

    def check_xfer_state(self, handle: Any) -> str:
        """DONE, PROC, or an error. With the last byte the peer learns that it can free its blocks."""
        if not isinstance(handle, Transfer):
            return str(self._nixl.check_xfer_state(handle))
        assert handle.copy is not None
        try:
            if not handle.copy.done():
                return "PROC"
        except OSError as wrong:
            log.warning("KV of %s could not be read: %s", handle.peer, wrong)
            return "ERR"
        if (life := self._lives.get(handle.peer)) is None or not life.lives():
            log.warning("KV of %s was read, but it may have ended before the last byte", handle.peer)
            return "ERR"
        handle.took = time.perf_counter() - handle.began
        if handle.note:
            self._nixl.send_notif(handle.peer, notif_msg=handle.note)
        return "DONE"

    def get_xfer_telemetry(self, handle: Any) -> Any:
        """Times in microseconds and bytes, as NIXL counts them."""
        if not isinstance(handle, Transfer):
            return self._nixl.get_xfer_telemetry(handle)
        return SimpleNamespace(
            xferDuration=handle.took * 1e6,
            postDuration=0.0,
            totalBytes=int(handle.rows[:, 1].sum()),
            descCount=len(handle.rows),
        )

    def release_xfer_handle(self, handle: Any) -> None:
        """Nothing of ours outlives its copy."""
        if not isinstance(handle, Transfer):
            self._nixl.release_xfer_handle(handle)
