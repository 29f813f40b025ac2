"""Engine cores as processes: programs of their own beside an accelerator, forked on a CPU (decision 137)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from taichi_serve.cluster.vllm.forking import LARGEST, Begun, Ended, Failed, Wanted
from taichi_serve.cluster.vllm.server.remains import ending
from taichi_serve.cluster.vllm.server.surroundings import on_cpu

CORE = "taichi_serve.cluster.vllm.core.main"
FORK_SERVER = "taichi_serve.cluster.vllm.core.forks"
END_SECONDS = 10.0  # between the end of a process and the word of it
SAID = 1 << 20  # bytes
# NumPy's threads would be there when it forks, and the cores' part of the work needs none.
ALONE = {b"OPENBLAS_NUM_THREADS": b"1"}


class Spawned(subprocess.Popen[bytes]):
    """A core that is a program of its own. `sentinel` can be read when it has ended."""

    def __init__(self, spec: Path, log: Path, env: Mapping[str, str]) -> None:
        with log.open("wb") as output:
            super().__init__(
                [sys.executable, "-m", CORE, str(spec)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.sentinel = os.pidfd_open(self.pid)

    def known(self) -> bool:
        """It is there."""
        return True

    def kill_group(self) -> None:
        """End its whole process group now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Nobody looks at the sentinel any more."""
        with contextlib.suppress(OSError):
            os.close(self.sentinel)


class Forked:
    """A core that is asked of a fork server, with what is used of a `subprocess.Popen`. `pid` is 0 until it
    is there, and for ever where it never is."""

    def __init__(self, server: ForkServer, log: Path) -> None:
        self.pid = 0
        self.sentinel = -1
        self._server = server
        self._log = log
        self._settled = threading.Event()  # whether it is there or never will be
        self._over = threading.Event()
        self._code: int | None = None
        self.unwanted = False

    def known(self) -> bool:
        """Wait until it is there; False where it never will be, or nobody wants it any more."""
        self._settled.wait()
        return bool(self.pid)

    def poll(self) -> int | None:
        """The exit code, None while it runs or is awaited."""
        if not self._over.is_set() and self.sentinel >= 0 and ended(self.sentinel, 0.0):
            self._over.wait(END_SECONDS)  # the word of it is under way
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises subprocess.TimeoutExpired."""
        if not self._over.wait(timeout) or self._code is None:
            raise subprocess.TimeoutExpired(CORE, timeout or 0.0)
        return self._code

    def send_signal(self, number: int) -> None:
        """To this process alone; one that is gone gets none."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.sentinel, number)

    def kill_group(self) -> None:
        """End its whole process group now, or as soon as there is one."""
        with self._server.lock:
            self.unwanted = True
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            else:
                self._settled.set()  # a fork server that hangs never answers
                self._server.not_needed()

    def close(self) -> None:
        """Nobody looks at the sentinel any more."""
        with contextlib.suppress(OSError):
            os.close(self.sentinel)

    # -------------------------------------------------------------- what the fork server tells, by thread

    def begun(self, pid: int, sentinel: int) -> None:
        """It is there."""
        with self._server.lock:
            self.pid, self.sentinel = pid, sentinel
        self._settled.set()
        if self.unwanted:
            self.kill_group()

    def ended(self, code: int, words: bytes = b"") -> None:
        """It is gone, or never was; what is to be said of that goes into its log."""
        if words:
            with contextlib.suppress(OSError), self._log.open("ab") as log:
                log.write(words)
        self._code = code
        self._over.set()
        self._settled.set()


class ForkServer:
    """One fork server, which imports as soon as it is made. A thread hears what it says."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._cores: dict[int, Forked] = {}  # that are asked for, or run
        self._numbers = itertools.count()
        self._gone = False
        self._line, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = os.memfd_create("fork-server")  # what it writes, for the log of whom it could not fork
        kept = {name: value for name, value in os.environb.items() if name not in ALONE}
        self._env = kept | {name.encode(): value.encode() for name, value in on_cpu().items()}
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", FORK_SERVER, str(its.fileno()), str(os.getpid())],
                env={**self._env, **ALONE},
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                pass_fds=[its.fileno()],
                process_group=0,
            )
        self._hearing = threading.Thread(target=self._hear, name="fork-server", daemon=True)
        self._hearing.start()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def fork(self, spec: Path, log: Path, env: Mapping[str, str]) -> Forked | None:
        """A core with this spec, log and environment, soon; None where the fork server is gone."""
        log.write_bytes(b"")
        core, number = Forked(self, log), next(self._numbers)
        whole = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
        differs: dict[bytes, bytes | None] = {k: v for k, v in whole.items() if self._env.get(k) != v}
        differs.update(dict.fromkeys(self._env.keys() - whole.keys()))
        wanted = Wanted(number, str(spec), str(log), differs, resource.getrlimit(resource.RLIMIT_NOFILE))
        with self.lock:
            if self._gone:
                return None
            self._cores[number] = core
        packet = msgspec.msgpack.encode(wanted)
        try:
            if len(packet) > LARGEST:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._line.send(packet)
        except ConnectionError:
            pass  # it is gone, and the thread that hears it says so to all
        except OSError as wrong:  # an environment that is too large for a packet
            self._ended(number, 1, f"OSError: {wrong}\n".encode())
        return core

    def not_needed(self) -> None:
        """One that was asked for is not needed. If that is so of all, nobody waits until it has imported."""
        if all(core.unwanted and not core.pid for core in self._cores.values()):
            self._gone = True
            self._process.kill()

    def close(self) -> None:
        """End it, and every core of it that still runs."""
        self._process.kill()
        self._hearing.join()

    def _hear(self) -> None:
        while (heard := self._next()) is not None:
            match heard:
                case Begun(number, pid), [sentinel]:
                    self._cores[number].begun(pid, sentinel)
                case Begun(
                    number, pid
                ), _:  # there was no descriptor left for it, and nobody could see it end
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                    self._ended(number, 1, b"OSError: too many open files: the server cannot watch it\n")
                case Ended(number, code), _:
                    self._ended(number, code)
                case Failed(number, why), _:
                    self._ended(number, 1, f"OSError: fork: {why}\n".encode())
        code = self._process.wait()
        with self.lock:
            self._gone = True
            left = list(self._cores.values())
            self._cores.clear()
        said = os.pread(self._said, SAID, 0)
        os.close(self._said)
        self._line.close()
        for core in left:
            if core.pid:
                ended(core.sentinel, END_SECONDS)  # the kernel kills it
        why = f"ForkServerError: its fork server ended first, {ending(code)}\n"
        for core in left:
            if core.pid:
                core.ended(-signal.SIGKILL, why.encode())
            else:
                core.ended(code or 1, said)

    def _next(self) -> tuple[Begun | Ended | Failed, list[int]] | None:
        """What it says next, with the descriptors that come along; None where it is gone."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._line, LARGEST, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        return (msgspec.msgpack.decode(packet, type=Begun | Ended | Failed), descriptors) if packet else None

    def _ended(self, number: int, code: int, words: bytes = b"") -> None:
        """Say so, once: whoever hears of an end first takes the core out."""
        with self.lock:
            core = self._cores.pop(number, None)
        if core is not None:
            core.ended(code, words)


class Forks:
    """The fork server of a server: one, as long as it lives, and then another."""

    def __init__(self) -> None:
        self.server: ForkServer | None = None

    def preload(self) -> ForkServer:
        """Have one import, if none is there. Only from the main thread, as a fork server ends with the thread
        that started it."""
        self.server = self.server or ForkServer()
        return self.server

    def begin(self, spec: Path, log: Path, env: Mapping[str, str]) -> Forked:
        """A core with this spec, log and environment. From the main thread, too."""
        while (core := self.preload().fork(spec, log, env)) is None:
            self.server = None
        return core

    def close(self) -> None:
        """End it; the cores have ended before."""
        if self.server is not None:
            self.server.close()
            self.server = None


def ended(process: int, seconds: float) -> bool:
    """Whether the process behind this descriptor ends within so many seconds."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
