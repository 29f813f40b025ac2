"""One engine process: start it with its own devices, wait until it is ready, notice its end, stop it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
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

from taichi_serve.cluster.vllm.wire import Spec
from taichi_serve.ports import LOOPBACK, port_of, reserve

# In /proc/PID/maps: the queues and locks between an engine core and its workers, and among the workers. A
# model that lies in /dev/shm is not one of these.
SHARED = re.compile(r" (/dev/shm/(?:psm_|sem\.mp-|vllm_dist_)[^/\s]+)$", re.MULTILINE)


class StartError(RuntimeError):
    """An instance did not start. The message names it, the likely cause and its log."""


def shared_memory(group: int) -> set[Path]:
    """Files of shared memory that vLLM made for itself and that processes of this group have mapped."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            if os.getpgid(int(process.name)) == group:
                found.update(Path(name) for name in SHARED.findall((process / "maps").read_text()))
    return found


class EngineProcess:
    """The process of one instance and the process group it leads.

    `sentinel`, `name` and `exitcode` are what vLLM's start-up handshake watches.
    """

    def __init__(self, name: str, directory: Path, argv: list[str], env: Mapping[str, str]) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self.handshake = f"ipc://{directory}/{name}.start"
        self.addresses = EngineZmqAddresses(
            inputs=[f"ipc://{directory}/{name}.in"], outputs=[f"ipc://{directory}/{name}.out"]
        )
        self.engine_id = f"{directory.name}-{name}"
        path = directory / f"{name}.json"
        path.write_bytes(msgspec.json.encode(Spec(argv, self.engine_id, self.handshake, os.getpid())))
        # The engine listens on it half a minute after it is chosen: time enough for it to be given away.
        self._side_channel = reserve()
        side_channel = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port_of(self._side_channel)),
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "taichi_serve.cluster.vllm.core.main", str(path)],
                # vLLM's own sockets inside an instance belong into our directory too: it leaves them behind.
                env={**os.environ, "VLLM_RPC_BASE_PATH": str(directory), **side_channel, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its workers can then be ended with it, by group. Not a session: Linux gives each one a
                # scheduling group of its own, and 6.18 can leave such a group without CPU time for minutes.
                process_group=0,
            )
        self.pid = self._process.pid
        self.sentinel = os.pidfd_open(self.pid)
        self.stopping = False
        self._shared: set[Path] = set()

    @property
    def exitcode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    def wait_ready(self, config: VllmConfig) -> None:
        """Block until the engine core is up (vLLM's handshake). Raises StartError when it ends instead."""
        context = zmq.Context()
        try:
            with context.socket(zmq.ROUTER) as socket:
                socket.linger = 0
                socket.bind(self.handshake)
                launch = CoreEngineLaunch(None, None, self.addresses, None)
                launch.watched_frontend_processes = [self]
                engines = [CoreEngine(index=0, local=True)]
                wait_for_engine_startup(
                    socket, engines, config.parallel_config, False, config.cache_config, launch
                )
            self._shared = shared_memory(self.pid)
        except RuntimeError as error:
            raise StartError(
                f"instance {self.name} did not start (exit code {self.exitcode}): {self.cause()}; "
                f"its log is {self.log}"
            ) from error
        finally:
            context.term()

    def cause(self) -> str:
        """The last line of its log that names an error."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        for line in reversed(lines):
            head = line.rsplit("] ", 1)[-1]
            if "Error: " in head and "EngineCore" not in head.split("Error: ")[0]:
                return head.removeprefix("ERROR ").strip()
        return lines[-1] if lines else "it wrote nothing"

    def on_exit(self, call: Callable[[int], Any]) -> None:
        """Have `call(exitcode)` made once, from a thread, when the process ends."""

        def watch() -> None:
            call(self._process.wait())

        threading.Thread(target=watch, name=f"watch-{self.name}", daemon=True).start()

    def terminate(self) -> None:
        """Ask the engine core to stop."""
        self.stopping = True
        if self.exitcode is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Have the whole group ended now, and do not wait for it."""
        self.stopping = True
        self._shared |= shared_memory(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """End the whole group now, and wait until nothing is left of it."""
        self.kill()
        self._process.wait()
        for path in self._shared:  # whoever made it had no time to take it away
            path.unlink(missing_ok=True)
        self._side_channel.close()

    def stop(self, timeout: float) -> None:
        """Ask, wait up to `timeout` seconds, then end the group; nothing of it is left afterwards."""
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self.end()
        with contextlib.suppress(OSError):
            os.close(self.sentinel)
