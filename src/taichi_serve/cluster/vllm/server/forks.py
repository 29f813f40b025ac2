"""Engine cores as processes: programs of their own beside an accelerator, forked on a CPU (decision 137).

One that had forked and is gone is followed by another. Where that one fails too, or nobody can be forked at
all, cores of a CPU are programs of their own: it is told once, with what it costs (decision 142). A core that
its fork server has forsaken is started again (process.py).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from taichi_serve.cluster.vllm.forking import LARGEST, Begun, Ended, Failed, Refused, Said, Wanted
from taichi_serve.cluster.vllm.server.forked import Forked
from taichi_serve.cluster.vllm.server.remains import ending, reap, wait_gone
from taichi_serve.cluster.vllm.server.spawned import Spawned, ended
from taichi_serve.cluster.vllm.server.surroundings import on_cpu

FORK_SERVER = "taichi_serve.cluster.vllm.core.forks"
END_SECONDS = 10.0  # between the end of a fork server and that of its cores
AGAIN_SECONDS = 600.0  # one that follows another and is gone before that was the last one
IMPORT_SECONDS = 30.0  # twice this may it take to import and to fork for the first time
SAID = 1 << 20  # bytes
# NumPy's threads would be there when it forks, and the cores' part of the work needs none.
ALONE = {b"OPENBLAS_NUM_THREADS": b"1"}
COSTS = "each takes some 14 s of processor time more to start, and 0.6 GiB more of memory"


class ForkServer:
    """One fork server, which imports as soon as it is made. A thread hears what it says. `gone` is why there
    is none any more, "" where nobody needed it. Twice `within` is how long it may take until it has forked
    for the first time; None: as long as it takes. Raises OSError where there cannot be one."""

    def __init__(self, directory: Path, within: float | None = None) -> None:
        self.lock = threading.RLock()
        self.forks = False  # it has imported all, and forked one
        self.within = within
        self.gone: str | None = None
        self.lasted = 0.0  # seconds, once it is gone
        self._began = time.monotonic()
        self._refused: str | None = None
        self._retired = False
        self._cores: dict[int, Forked] = {}  # that are asked for, or run
        self._numbers = itertools.count()
        kept = {name: value for name, value in os.environb.items() if name not in ALONE}
        self._env = kept | {name.encode(): value.encode() for name, value in on_cpu().items()}
        with contextlib.ExitStack() as opened:
            self._line, its = map(
                opened.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            )
            # What it writes, for the log of whom it could not fork.
            self._said = opened.enter_context(os.fdopen(os.memfd_create("fork-server"), "rb"))
            words = (str(its.fileno()), str(os.getpid()), str(directory))
            self._process = subprocess.Popen(
                [sys.executable, "-m", FORK_SERVER, *words],
                env={**self._env, **ALONE},
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                pass_fds=[its.fileno()],
                process_group=0,
            )
            opened.pop_all()
        its.close()
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
            if self.gone is not None:
                return None
            self._cores[number] = core
        packet = msgspec.msgpack.encode(wanted)
        try:
            if len(packet) > LARGEST:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._line.send(packet, socket.MSG_DONTWAIT)  # one that stands still does not read
        except ConnectionError:
            pass  # it is gone, and the thread that hears it says so to all
        except OSError as wrong:  # an environment that is too large for a packet
            self._failed(number, f"OSError: {wrong}")
        return core

    def not_needed(self) -> None:
        """One that was asked for is not needed. If that is so of all, nobody waits until it has imported."""
        if all(core.unwanted and not core.pid for core in self._cores.values()):
            self.gone = "" if self.gone is None else self.gone
            self._process.kill()

    def retire(self) -> None:
        """It is asked for no more: it ends with the last core of it, for its memory."""
        with self.lock:
            self._retired = True
            if not self._cores:
                self._process.kill()

    def close(self) -> None:
        """End it, and every core of it that still runs."""
        self._process.kill()
        self._hearing.join()

    def _hear(self) -> None:
        while (heard := self._next()) is not None:
            match heard:
                case Begun(number, pid), [sentinel]:
                    self.forks = True
                    self._cores[number].begun(pid, sentinel)
                case Begun(number, pid), _:  # no descriptor was left for it, and nobody could see it end
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                    self._failed(number, "OSError: too many open files: the server cannot watch it")
                case Ended(number, code), _:
                    self._ended(number, code)
                case Failed(number, why), _:
                    self._failed(number, f"OSError: fork: {why}")
                case Refused(why), _:
                    self._refused = why
        self._buried(self._end())

    def _end(self) -> int:
        """Wait for its end, and end its janitor: this server lives. The exit code."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # its number is not yet given again
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        if wait_gone(self.pid, END_SECONDS):
            reap(self.pid)
        return code

    def _buried(self, code: int) -> None:
        """Tell all who waited for it, and whose cores it took along."""
        said = os.pread(self._said.fileno(), SAID, 0).decode(errors="replace")
        self._said.close()
        how = self._refused or f"its fork server ended first, {ending(code)}"
        if code > 0 and self._refused is None and (lines := said.split("\n")[:-1]):
            how = f"{how} ({lines[-1]})"
        with self.lock:
            self.lasted = time.monotonic() - self._began
            self.gone = how if self.gone is None else self.gone
            left = list(self._cores.values())
            self._cores.clear()
        self._line.close()
        for core in left:
            if core.pid:
                ended(core.sentinel, END_SECONDS)  # the kernel kills it
                core.ended(-signal.SIGKILL, f"ForkServerError: {how}\n", how)
            else:
                core.ended(code or 1, said, how)

    def _next(self) -> tuple[Said, list[int]] | None:
        """What it says next, with the descriptors that come along; None where it is gone."""
        while True:
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._line, LARGEST, 1, socket.MSG_CMSG_CLOEXEC)
                break
            except ConnectionResetError:
                continue  # once, where it ended with a request unread: before what it said last
            except OSError:
                return None
        return (msgspec.msgpack.decode(packet, type=Said), descriptors) if packet else None

    def _failed(self, number: int, why: str) -> None:
        """It was not forked."""
        self._ended(number, 1, f"{why}\n", why)

    def _ended(self, number: int, code: int, words: str = "", forsaken: str | None = None) -> None:
        """Say so, once: whoever hears of an end first takes the core out."""
        with self.lock:
            core = self._cores.pop(number, None)
        if core is not None:
            core.ended(code, words, forsaken)
        if self._retired:
            self.retire()


class Forks:
    """The fork server of a server, and another when that one is gone, as long as it forks: then cores are
    programs of their own. `directory` is the server's, and `say` tells its operator."""

    def __init__(self, directory: Path, say: Callable[[str], None]) -> None:
        self.server: ForkServer | None = None
        self._directory = directory
        self._say = say
        self._follows = False  # one that had forked, and was lost
        self._given_up = False

    def preload(self) -> ForkServer:
        """Have one import, if none is there. Only from the main thread, as a fork server ends with the thread
        that started it. Raises OSError."""
        within = IMPORT_SECONDS if self._follows else None
        self.server = self.server or ForkServer(self._directory, within)
        return self.server

    def begin(self, spec: Path, log: Path, env: Mapping[str, str]) -> Forked | Spawned:
        """A core with this spec, log and environment. From the main thread, too. Raises OSError."""
        while not self._given_up:
            try:
                server = self.preload()
            except OSError as wrong:
                self.give_up(f"OSError: {wrong}")
            else:
                if (core := server.fork(spec, log, env)) is not None:
                    return core
                self._lost(server)
        return Spawned(spec, log, env)

    def failed(self, core: Forked) -> None:
        """A fork server did not do its part for this core. One that runs on forks nobody any more; what comes
        after one that is gone is decided when the next core is begun."""
        if core.forsaken is not None and core.server.gone is None:
            self.give_up(core.forsaken)

    def _lost(self, server: ForkServer) -> None:
        """This one is gone. Another one follows it, but for one that never forked or was itself the second
        in a short time: it would be lost of the same cause."""
        self.server = None
        if not server.gone:  # nobody needed it
            return
        if server.forks and (not self._follows or server.lasted >= AGAIN_SECONDS):
            self._follows = True
        else:
            self.give_up(server.gone)

    def give_up(self, why: str) -> None:
        """Fork nobody any more."""
        if not self._given_up:
            self._given_up = True
            if self.server is not None:
                self.server.retire()
            self._say(f"engine processes are not forked but programs of their own: {why}; {COSTS}")

    def close(self) -> None:
        """End it; the cores have ended before."""
        if self.server is not None:
            self.server.close()
            self.server = None
