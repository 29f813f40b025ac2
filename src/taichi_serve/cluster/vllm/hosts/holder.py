"""Holds one engine process on a host of its own: what runs in an actor there, and is asked by the server.

It outlives its server. An engine that serves waits then, as long as it was told to, for the next server; any
other one is ended. It does what its present server says, and nobody else.

It knows nothing of Ray and imports no vLLM. Each of its methods may be called from a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from taichi_serve.cluster.vllm.belongings import remove_with_the_last, shared_memory
from taichi_serve.cluster.vllm.curve import Keys, replace_keys, write_keys, write_private
from taichi_serve.cluster.vllm.hosts.words import FREE_SECONDS, LATER, Begun, Offer, Order, Said
from taichi_serve.cluster.vllm.interface import only
from taichi_serve.cluster.vllm.server.remains import remove_files, wait_gone
from taichi_serve.cluster.vllm.server.spawned import Spawned
from taichi_serve.cluster.vllm.spec import SIGNAL, Spec
from taichi_serve.cluster.vllm.wire import flight_file
from taichi_serve.ports import port_of, reserve

FOLLOW_SECONDS = 1.0  # that an answer about what it wrote is waited for
LOOK_SECONDS = 0.05  # between two looks at its log meanwhile
MOST = 1 << 20  # bytes of its log in one answer
END_SECONDS = 60.0  # that the kernel may take to end a group
ALONE_SECONDS = 20.0  # and without one that may come it is ended


class Holder:
    """At most one engine process, at this address and on this node."""

    def __init__(
        self,
        host: str,
        node: str,
        begin: Callable[..., Spawned] = Spawned,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host, self._node, self._begin, self._clock = host, node, begin, clock
        self._order: Order | None = None
        self._process: Spawned | None = None
        self._side_channel: Any = None
        self._shared: set[Path] = set()
        self._directory = Path()
        self._log = Path()
        self._over = False
        self._server = ""
        self._heard_at = clock()
        self._keep: float | None = None  # seconds; None: it does not serve yet
        self._begun: Begun | None = None
        self._lock = threading.Lock()  # whose it is

    # ---------------------------------------------------------------------------------------- whose it is

    def _of(self, server: str) -> None:
        """Raises PermissionError where another server has the engine by now."""
        with self._lock:
            if server != self._server:
                raise PermissionError("another server has taken it over")
            self._heard_at = self._clock()

    def keep(self, server: str, seconds: float) -> None:
        """It serves; without a server it waits so long for the next one."""
        self._of(server)
        self._keep = seconds

    def offer(self, server: str) -> bytes:
        """It is this server's from now on, and `Offer`; LATER where its own said something just now, and
        nothing where it is not to be had."""
        with self._lock:
            here = self._process is not None and not self._over and self._process.poll() is None
            if not here or not self._keep:
                return b""
            if self._alone() < FREE_SECONDS:
                return LATER
            self._server, self._heard_at = server, self._clock()
        assert self._order is not None and self._begun is not None
        its = self._order
        return msgspec.msgpack.encode(Offer(its.run, its.name, its.engine_id, its.keys.mesh, self._begun))

    def again(self, server: str, keys: bytes) -> bytes:
        """Have the engine speak to this server; `Begun`."""
        self._of(server)
        assert self._order is not None and self._begun is not None
        its = msgspec.msgpack.decode(keys, type=Keys)
        replace_keys(self._directory, self._order.engine_id, its)
        self._known.send_signal(SIGNAL)
        return msgspec.msgpack.encode(self._begun)

    def _alone(self) -> float:
        return self._clock() - self._heard_at

    def forsaken(self) -> bool:
        """Whether nobody speaks to it, nor will."""
        with self._lock:
            if self._alone() <= max(ALONE_SECONDS, self._keep or 0.0):
                return False
            self._server, self._keep = "", None  # whoever comes now comes too late
            return True

    # ----------------------------------------------------------------------------------- what it is asked

    def at(self) -> tuple[str, str]:
        """The node that it is on, and its address."""
        return self._node, self._host

    def begin(self, order: bytes) -> bytes:
        """Start what this `Order` says; `Begun`. Raises OSError where this host does not let it."""
        its = msgspec.msgpack.decode(order, type=Order)
        self._server = its.server
        path = self._spec(its)
        self._order = its  # from here on there is something to take away
        self._log = self._directory / f"{its.name}.log"
        write_keys(self._directory, its.engine_id, its.keys)
        self._side_channel = reserve(self._host)
        (self._directory / its.name).mkdir()
        env = {
            **os.environ,
            **only(self._host),
            "VLLM_RPC_BASE_PATH": str(self._directory),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": self._host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port_of(self._side_channel)),
            **its.env,
        }
        began = threading.Event()
        wrong: list[Exception] = []

        def run() -> None:
            # The kernel ends the process with the thread that started it: this one stays as long.
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, 0, 0)  # Ray starts its workers at 15 unless told otherwise
            try:
                self._process = self._begin(path, self._log, env)
            except Exception as failed:  # noqa: BLE001  it is raised where it was asked for
                wrong.append(failed)
                return
            finally:
                began.set()
            self._process.wait()

        threading.Thread(target=run, name="engine", daemon=True).start()
        began.wait()
        if wrong:
            raise OSError(f"its process could not be started: {wrong[0]}") from wrong[0]
        niceness = os.getpriority(os.PRIO_PROCESS, self._known.pid)
        self._begun = Begun(self._known.pid, self._host, niceness)
        self._of(its.server)
        return msgspec.msgpack.encode(self._begun)

    def _spec(self, its: Order) -> Path:
        """The file that the engine reads first, in the directory of all of this host. Whoever takes that away
        because nothing was in it is too late once this is."""
        spec = Spec(its.argv, its.engine_id, its.handshake, os.getpid(), shared=True)
        while True:
            self._directory = _directory(its.run, self._node)
            path = self._directory / f"{its.name}.json"
            with contextlib.suppress(FileNotFoundError):
                write_private(path, msgspec.json.encode(spec))
                return path

    @property
    def _known(self) -> Spawned:
        assert self._process is not None
        return self._process

    def follow(self, server: str, at: int) -> bytes:
        """`Said`: what its log has after `at` bytes. Waits up to a second for something to say."""
        self._of(server)
        process = self._known
        for _ in range(round(FOLLOW_SECONDS / LOOK_SECONDS)):
            code = process.poll()  # first: what it wrote before its end is there then
            words = self._written(at)
            if words or code is not None:
                over = code is not None and len(words) < MOST
                return msgspec.msgpack.encode(
                    Said(words, code if over else None, self._flight() if over else b"")
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_SECONDS)
        return msgspec.msgpack.encode(Said(b""))

    def _written(self, at: int) -> bytes:
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(at)
            return log.read(MOST)
        return b""

    def _flight(self) -> bytes:
        assert self._order is not None
        with contextlib.suppress(OSError):
            return flight_file(self._directory, self._order.engine_id).read_bytes()
        return b""

    def signal(self, server: str, number: int) -> None:
        """To its process alone."""
        self._of(server)
        if not self._over:
            self._look()
            self._known.send_signal(number)

    def kill(self, server: str) -> None:
        """End its whole group now."""
        self._of(server)
        self._kill()

    def _kill(self) -> None:
        if not self._over:
            self._look()
            self._known.kill_group()

    def _look(self) -> None:
        if self._known.poll() is None:
            self._shared |= shared_memory(self._known.pid)

    def end(self, server: str) -> bool:
        """End its whole group and take away what it left; False where the kernel has not ended all of it."""
        self._of(server)
        return self.clear()

    def clear(self) -> bool:
        """The same, whoever's it is."""
        if self._order is None or self._over:
            return True
        gone = True
        if self._process is not None:
            self._kill()
            gone = wait_gone(self._process.pid, END_SECONDS)
            self._process.close()
        self._over = True  # its number may be somebody else's by now
        for path in self._shared:
            path.unlink(missing_ok=True)
        if self._side_channel is not None:
            self._side_channel.close()
        self._log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it never had a directory
            remove_files(self._directory, self._order.name, self._order.engine_id)
        remove_with_the_last(self._directory)
        return gone


def _directory(run: str, node: str) -> Path:
    """The directory of a server's instances on one node. Raises PermissionError where others have it."""
    path = Path(tempfile.gettempdir()) / f"{run}-{node[:12]}"
    path.mkdir(mode=0o700, exist_ok=True)
    its = path.lstat()
    if not stat.S_ISDIR(its.st_mode) or its.st_uid != os.getuid() or its.st_mode & 0o077:
        raise PermissionError(f"{path} is not ours alone")
    return path
