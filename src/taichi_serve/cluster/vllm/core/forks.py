"""A fork server: `python -m taichi_serve.cluster.vllm.core.forks SOCKET SERVER`, on a CPU (decision 137).

It imports once what every engine core imports, and forks a core whenever the server asks for one: that costs
milliseconds, where a program of its own imports for ten seconds. It stays single-threaded, because only the
thread that forks is there in the child. Its children end with it, and it ends with the server.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from setproctitle import getproctitle, setproctitle

from taichi_serve.cluster.vllm.core.main import die_with_parent, read, run
from taichi_serve.cluster.vllm.forking import LARGEST, Begun, Ended, Failed, Wanted

PROGRAM = "taichi_serve.cluster.vllm.core.main"  # what a core is called, forked or not
# What a core of the CPU and its workers import sooner or later, the models aside.
MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.model_loader",
    "taichi_serve.cluster.vllm.args",
    "taichi_serve.cluster.vllm.connector",
    "taichi_serve.cluster.vllm.core.calls",
    "taichi_serve.cluster.vllm.core.ending",
    "taichi_serve.cluster.vllm.worker.connector",
    "taichi_serve.cluster.vllm.worker.forked",
)


# From what is asked to differ to what a child has.
Environment = Callable[[Mapping[bytes, bytes | None]], dict[bytes, bytes]]


class ForkServer:
    """Forks what `line` asks for."""

    def __init__(self, line: socket.socket, env: Environment) -> None:
        self._line = line
        self._env = env
        self._this = os.getpid()
        self._children: dict[int, tuple[int, int]] = {}  # by pidfd: number and pid
        self._poll = select.poll()
        self._poll.register(line, select.POLLIN)

    def serve(self) -> Wanted:
        """Fork whenever it is asked to, and tell how children end. It returns in each child, with what that
        one is to be; this process ends in here."""
        while True:
            for ready, _ in self._poll.poll():
                if ready in self._children:
                    self._ended(ready)
                elif (wanted := self._asked()) is not None:
                    return wanted

    def _asked(self) -> Wanted | None:
        packet = self._line.recv(LARGEST)
        if not packet:
            os._exit(0)  # the server is gone
        wanted = msgspec.msgpack.decode(packet, type=Wanted)
        sys.stdout.flush()  # else the child would write it once more
        sys.stderr.flush()
        hold, go = os.pipe()
        try:
            pid = os.fork()
        except OSError as wrong:
            os.close(hold)
            os.close(go)
            self._line.send(msgspec.msgpack.encode(Failed(wanted.number, str(wrong))))
            return None
        if not pid:
            os.close(go)
            self._become(wanted, hold)
            return wanted
        os.close(hold)
        self._tell(wanted.number, pid)
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            os.write(go, b"!")
        os.close(go)
        return None

    def _tell(self, number: int, pid: int) -> None:
        with contextlib.suppress(
            OSError
        ):  # it does the same: whoever comes first, it is done when it is told
            os.setpgid(pid, pid)
        child = os.pidfd_open(pid)
        self._children[child] = number, pid
        self._poll.register(child, select.POLLIN)
        socket.send_fds(self._line, [msgspec.msgpack.encode(Begun(number, pid))], [child])

    def _ended(self, child: int) -> None:
        number, pid = self._children.pop(child)
        self._poll.unregister(child)
        os.close(child)
        _, status = os.waitpid(pid, 0)
        self._line.send(msgspec.msgpack.encode(Ended(number, os.waitstatus_to_exitcode(status))))

    def _become(self, wanted: Wanted, hold: int) -> None:
        """In the child: all that a program of its own would have been started with."""
        os.setpgid(0, 0)
        die_with_parent(self._this)
        if not os.read(hold, 1):  # the fork server ended before it could tell
            os._exit(1)
        os.close(hold)
        self._line.close()
        for sibling in self._children:
            os.close(sibling)
        log = os.open(wanted.log, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environb.update(self._env(wanted.env))
        resource.setrlimit(resource.RLIMIT_NOFILE, wanted.files)
        sys.argv = [PROGRAM, wanted.spec]
        setproctitle(f"{sys.executable} -m {PROGRAM} {wanted.spec}")
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed()  # Python's own generator does so by itself


def preload() -> None:
    """Import all of it. Raises RuntimeError where a thread runs afterwards."""
    for name in MODULES:
        importlib.import_module(name)
    tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name))
    if len(tasks) > 1:
        names = ", ".join((task / "comm").read_text().strip() for task in tasks[1:])
        raise RuntimeError(f"it cannot be forked: what it imported runs threads ({names})")
    gc.collect()
    gc.freeze()  # or the first collection of each child would copy all of it


def main(line: int, server: int) -> None:
    """Serve; in a child, run the engine core."""
    die_with_parent(server)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the cores do: the server alone decides
    getproctitle()  # it finds the room for titles as long as the environment is where the kernel put it
    given = dict(os.environb)
    del given[b"OPENBLAS_NUM_THREADS"]
    preload()
    imported = {name: value for name, value in os.environb.items() if given.get(name) != value}
    del imported[b"OPENBLAS_NUM_THREADS"]

    def env(asked: Mapping[bytes, bytes | None]) -> dict[bytes, bytes]:
        whole = {**given, **asked, **imported}  # imports come last, as in a program of its own
        return {name: value for name, value in whole.items() if value is not None}

    wanted = ForkServer(socket.socket(fileno=line), env).serve()
    run(wanted.spec, read(wanted.spec), forked=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
