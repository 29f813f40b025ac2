"""A fork server, on a CPU (decision 137): `python -m taichi_serve.cluster.vllm.core.forks LINE PID FOLDER`.

It imports once what every engine core imports, and forks a core whenever the server asks for one: that costs
milliseconds, where a program of its own imports for ten seconds. It stays single-threaded, because only the
thread that forks is there in the child, and refuses where an import has started another one. Its children
end with it, and it ends with the server; a janitor beside it sees to what is left before there is a core.
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
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import msgspec
from setproctitle import getproctitle, setproctitle

from taichi_serve.cluster.vllm.core.janitor import watch
from taichi_serve.cluster.vllm.core.main import die_with_parent, read, run
from taichi_serve.cluster.vllm.forking import LARGEST, Begun, Ended, Failed, Refused, Said, Wanted

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


# The server alone decides when this process ends: not Ctrl-C, a terminal that closes, or who stops a whole
# control group. All cores would end with it. Blocked, so that what is sent to a child at once reaches it.
UNHEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ThreadsError(RuntimeError):
    """There is more than one thread here. The message names the others."""


# From what is asked to differ to what a child has.
Environment = Callable[[Mapping[bytes, bytes | None]], dict[bytes, bytes]]


class ForkServer:
    """Forks what `line` asks for. `blocked` are the signals that a child does not hear."""

    def __init__(self, line: socket.socket, env: Environment, blocked: set[int | signal.Signals]) -> None:
        self._line = line
        self._env = env
        self._blocked = blocked
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
        try:
            return self._fork(wanted)
        except OSError as wrong:  # too many processes, or open files, or it is not allowed
            self._say(Failed(wanted.number, str(wrong)))
            return None

    def _say(self, word: Said, *descriptors: int) -> None:
        socket.send_fds(self._line, [msgspec.msgpack.encode(word)], descriptors)

    def _fork(self, wanted: Wanted) -> Wanted | None:
        """Raises OSError where there is no child then."""
        hold, go = os.pipe()
        pid = -1
        try:
            pid = os.fork()
            if not pid:
                os.close(go)
                self._become(wanted, hold)
                return wanted
            self._tell(wanted.number, pid)
            with contextlib.suppress(BrokenPipeError):  # somebody has killed it
                os.write(go, b"!")
            return None
        except OSError:
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise
        finally:
            if pid:
                os.close(hold)
                os.close(go)

    def _tell(self, number: int, pid: int) -> None:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # it does the same: whoever comes first, it is done when it is told
        child = os.pidfd_open(pid)
        self._say(Begun(number, pid), child)
        self._children[child] = number, pid
        self._poll.register(child, select.POLLIN)

    def _ended(self, child: int) -> None:
        number, pid = self._children.pop(child)
        self._poll.unregister(child)
        os.close(child)
        _, status = os.waitpid(pid, 0)
        self._say(Ended(number, os.waitstatus_to_exitcode(status)))

    def _become(self, wanted: Wanted, hold: int) -> None:
        """In the child: all that a program of its own would have been started with."""
        try:
            self._part(hold)
            log = os.open(wanted.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            self._as(wanted)
        except BaseException:  # noqa: BLE001  what is above this is the fork server's
            _die()

    def _part(self, hold: int) -> None:
        """A process group of its own, and nothing of the fork server's."""
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        die_with_parent(self._this)
        if not os.read(hold, 1):  # the fork server ended before it could tell
            os._exit(1)
        os.close(hold)
        self._line.close()
        for sibling in self._children:
            os.close(sibling)

    def _as(self, wanted: Wanted) -> None:
        os.environ.clear()
        os.environb.update(self._env(wanted.env))
        resource.setrlimit(resource.RLIMIT_NOFILE, wanted.files)
        sys.argv = [PROGRAM, wanted.spec]
        setproctitle(f"{sys.executable} -m {PROGRAM} {wanted.spec}")
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed()  # Python's own generator does so by itself


def preload() -> None:
    """Import all of it. Raises ThreadsError where a thread runs afterwards."""
    for name in MODULES:
        importlib.import_module(name)
    alone()
    gc.collect()
    gc.freeze()  # or the first collection of each child would copy all of it


def alone() -> None:
    """Raises ThreadsError where another thread runs: what Python imports when it begins may start one."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    others = sorted(int(t.name) for t in Path("/proc/self/task").iterdir() if int(t.name) != os.getpid())
    if others:
        known = [names.get(n) or Path(f"/proc/self/task/{n}/comm").read_text().strip() for n in others]
        raise ThreadsError(f"what Python imports here runs threads ({', '.join(known)})")


def load(line: socket.socket, server: int, directory: str) -> Environment:
    """Have everything imported; from what is asked to differ to what a child has. It ends where it cannot."""
    try:
        alone()
        given = dict(os.environb)
        given.pop(b"OPENBLAS_NUM_THREADS", None)
        watch(server, Path(directory))
        preload()
    except ThreadsError as threads:
        line.send(msgspec.msgpack.encode(Refused(str(threads))))
        _die()
    except BaseException:  # noqa: BLE001  a thread that an import left behind would be waited for
        _die()
    imported = {name: value for name, value in os.environb.items() if given.get(name) != value}
    imported.pop(b"OPENBLAS_NUM_THREADS", None)
    taken = given.keys() - os.environb.keys()

    def env(asked: Mapping[bytes, bytes | None]) -> dict[bytes, bytes]:
        whole = {**given, **asked, **imported}  # imports come last, as in a program of its own
        return {name: value for name, value in whole.items() if value is not None and name not in taken}

    return env


def _die() -> NoReturn:
    """End at once, and write down why."""
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def main(socket_: int, server: int, directory: str) -> None:
    """Serve; in a child, run the engine core."""
    die_with_parent(server)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)
    getproctitle()  # it finds the room for titles as long as the environment is where the kernel put it
    line = socket.socket(fileno=socket_)
    line.set_inheritable(False)
    wanted = ForkServer(line, load(line, server, directory), blocked).serve()
    run(wanted.spec, read(wanted.spec), forked=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
