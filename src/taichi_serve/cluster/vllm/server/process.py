"""One engine process: start it with its own devices, wait until it is ready, notice its end, stop it.

What kind of process it is, and how it comes about, is in forks.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq
from vllm.config import VllmConfig
from vllm.v1.engine.utils import (
    CoreEngine,
    CoreEngineLaunch,
    EngineZmqAddresses,
    wait_for_engine_startup,
)

from taichi_serve.cluster.vllm.belongings import shared_memory
from taichi_serve.cluster.vllm.curve import write_keys, write_private
from taichi_serve.cluster.vllm.interface import only
from taichi_serve.cluster.vllm.server.child import Child
from taichi_serve.cluster.vllm.server.forked import Forked
from taichi_serve.cluster.vllm.server.forks import Forks
from taichi_serve.cluster.vllm.server.line import Line, engine_id, over_files
from taichi_serve.cluster.vllm.server.remains import ending, reap, remove_files, wait_gone
from taichi_serve.cluster.vllm.server.spawned import Spawned
from taichi_serve.cluster.vllm.spec import Spec
from taichi_serve.cluster.vllm.wire import direct
from taichi_serve.ports import port_of, reserve

END_SECONDS = 60.0  # that the kernel may take to end a group: memory of a GPU is given back in it
TAIL = 1 << 16  # bytes of a log in which its last error is looked for
# vLLM's front end sets it, so engines that are started again would send spans of their loading, and the
# others none.
NO_TRACES = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ""}


class StartError(RuntimeError):
    """An instance did not start. The message names it, the likely cause and its log."""


def reason(wrong: Exception) -> str:
    """Why a start failed, in words: a StartError has them, and of others the kind is needed too."""
    return str(wrong) if isinstance(wrong, StartError) else f"{type(wrong).__name__}: {wrong}"


class Process:
    """One process of an instance and the process group it leads: the next one has another name and id.

    `sentinel`, `name` and `exitcode` are what vLLM's start-up handshake watches. `directory` is the server's,
    and `log` is there, wherever the process runs.
    """

    _process: Child
    found: bool = False  # whether another server started it
    host: str = ""  # an address of the one that it runs on; "" where that is the server's
    direct: set[str] | None = None  # engines whose memory it reads itself, where that is not to be seen here

    def __init__(self, name: str, directory: Path, line: Line) -> None:
        """It is spoken to on `line`."""
        self.name = name
        self.directory = directory
        self.log = directory / f"{name}.log"
        self.engine_id = engine_id(directory, name)
        self.line = line
        self.addresses = EngineZmqAddresses(inputs=[line.inputs], outputs=[line.outputs])
        self.stopping = False
        self._ending = threading.Lock()
        self._over = False  # its number may be somebody else's by now

    @property
    def torn(self) -> bool:
        """Whether what ended it was the end of its host, or of the way there."""
        return False

    def serves(self) -> None:
        """It is up, and can be spoken to."""

    def look(self) -> None:
        """See what it shares with others, while it is there to be asked."""

    def clear(self) -> bool:
        """Take away what it left, now that it has ended; False where the kernel has not ended all of it."""
        raise NotImplementedError

    def reads(self, source: str) -> bool:
        """Whether every rank of it reads the memory of that engine itself."""
        if self.direct is not None:
            return source in self.direct
        return direct(self.directory, self.engine_id, source, len(self.line.copiers))

    @property
    def pid(self) -> int:
        """Its number; 0 as long as it is not forked yet."""
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """A descriptor that can be read when it has ended."""
        return self._process.sentinel

    @property
    def exitcode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    def run_on(self, cores: set[int]) -> None:
        """Have the engine core, not its workers, keep to these cores of the server's host, if it is there."""

    def wait_ready(self, config: VllmConfig) -> None:
        """Block until the engine core is up (vLLM's handshake). Raises StartError when it ends instead."""
        context = zmq.Context()
        try:
            if not self._process.known():
                raise RuntimeError("it was never there")
            with self.line.listen(context, zmq.ROUTER, self.line.handshake) as socket:
                launch = CoreEngineLaunch(None, None, self.addresses, None)
                launch.watched_frontend_processes = [self]
                engines = [CoreEngine(index=0, local=True)]
                wait_for_engine_startup(
                    socket, engines, config.parallel_config, False, config.cache_config, launch
                )
            self.look()
        except RuntimeError as error:
            raise StartError(
                f"instance {self.name} did not start ({ending(self.exitcode)}): {self.cause()}; "
                f"its log is {self.log}"
            ) from error
        finally:
            context.term()

    def again(self) -> bool:
        """Start it once more where that could help; whether that is so. Raises StartError."""
        return False

    def cause(self) -> str:
        """The last line of its log that names an error; else its last line."""
        lines = self._last_lines()
        return _error(lines) or next((line for line in reversed(lines) if line), "it wrote nothing")

    def end_of(self, what: str) -> str:
        """What ended it, with the error that its log names, if any."""
        error = _error(self._last_lines())
        return f"{what}: {error}" if error else what

    def _last_lines(self) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
            return [line.strip() for line in log.read().decode(errors="replace").splitlines()]

    def on_exit(self, call: Callable[[int], Any]) -> None:
        """Have `call(exitcode)` made once, from a thread, when the process ends."""

        def watch() -> None:
            call(self._process.wait())

        threading.Thread(target=watch, name=f"watch-{self.name}", daemon=True).start()

    def terminate(self) -> None:
        """Ask the engine core to stop."""
        self.stopping = True
        if self.pid and self.exitcode is None:
            self.look()
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Have the whole group ended now, stopped processes too, and do not wait for it."""
        self.stopping = True
        if self._over:
            return
        self.look()
        self._process.kill_group()

    def end(self) -> bool:
        """End the whole group now and wait until nothing is left of it but its log; False where the kernel
        did not end it in time."""
        with self._ending:
            if self._over:
                return True
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            gone = self.clear()
            self._over = True
            self.line.close()
            return gone

    def stop(self, timeout: float) -> bool:
        """Ask, wait up to `timeout` seconds, then end the group; nothing of it is left afterwards, or `end`
        says so."""
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self.end()


class EngineProcess(Process):
    """One on this host."""

    def __init__(
        self,
        name: str,
        directory: Path,
        argv: list[str],
        env: Mapping[str, str],
        forks: Forks | None,
        line: Line | None = None,
    ) -> None:
        """Start it and return at once. `forks` forks it; without, it is a program of its own. It is spoken to
        on `line`, or over files."""
        super().__init__(name, directory, line or over_files(directory, name))
        line = self.line
        path = directory / f"{name}.json"
        write_private(path, msgspec.json.encode(Spec(argv, self.engine_id, line.handshake, os.getpid())))
        if line.keys is not None:
            write_keys(directory, self.engine_id, line.keys)
        # The engine listens on it half a minute after it is chosen: time enough for it to be given away.
        self._side_channel = reserve(line.host)
        side_channel = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": line.host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port_of(self._side_channel)),
            **(only(line.host) if line.keys is not None else {}),
        }
        (directory / name).mkdir()  # for what it makes by itself and may leave behind (core/main.py)
        # vLLM's own sockets inside an instance belong into our directory too: it leaves them behind.
        own = {**NO_TRACES, "VLLM_RPC_BASE_PATH": str(directory), **side_channel, **env}
        # It leads a process group: its workers can be ended with it. Not a session: Linux gives each one a
        # scheduling group of its own, and 6.18 can leave such a group without CPU time for minutes.
        self._forks = forks
        self._program = path, self.log, {**os.environ, **own}
        begin = Spawned if forks is None else forks.begin
        self._process = begin(*self._program)
        self._shared: set[Path] = set()

    def run_on(self, cores: set[int]) -> None:
        """Any core, if there are none. Beside a worker that computes on one of few cores, the engine core
        would take the worker's time and not that of a free one."""
        with contextlib.suppress(OSError):  # it is gone, which is seen elsewhere
            for thread in list(Path(f"/proc/{self.pid}/task").iterdir()) if cores else ():
                with contextlib.suppress(ProcessLookupError):  # threads of a start end while it is looked
                    os.sched_setaffinity(int(thread.name), cores)

    def again(self) -> bool:
        """Where its fork server failed it: forked by another one, or as a program of its own. From the main
        thread, as whoever is started ends with the thread that did it."""
        failed = self._process
        if self.stopping or self._forks is None or not isinstance(failed, Forked) or failed.forsaken is None:
            return False
        self._forks.failed(failed)
        self.look()
        failed.kill_group()  # it may come late
        failed.close()
        try:
            self._process = self._forks.begin(*self._program)
        except OSError as wrong:
            raise StartError(f"instance {self.name} could not be started: {wrong}") from wrong
        return True

    def look(self) -> None:
        """Once it has ended nobody can tell."""
        if self.pid:
            self._shared |= shared_memory(self.pid)

    def clear(self) -> bool:
        """All but its log."""
        gone = not self.pid or wait_gone(self.pid, END_SECONDS)
        if self.pid and gone:
            reap(self.pid)
        self._over = True
        for path in self._shared:  # whoever made it had no time to take it away
            path.unlink(missing_ok=True)
        self._side_channel.close()
        self._process.close()
        remove_files(self.directory, self.name, self.engine_id)
        return gone


def _error(lines: list[str]) -> str:
    """The last of these that names an error, without what vLLM's log puts before it; "" where none does."""
    for line in reversed(lines):
        head = line.rsplit("] ", 1)[-1]
        if "Error: " in head and "EngineCore" not in head.split("Error: ")[0]:
            return head.removeprefix("ERROR ").strip()
    return ""
