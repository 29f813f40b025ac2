"""An engine core that a fork server was asked for (decision 137)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Protocol

from taichi_serve.cluster.vllm.server.remains import exit_code
from taichi_serve.cluster.vllm.server.spawned import CORE, ended, kill_group

FORK_SECONDS = 10.0  # twice this may a fork server take that has forked before: it needs milliseconds
WORD_SECONDS = 5.0  # between the end of a core and the word of it, from a fork server that runs


class ForkServer(Protocol):
    """What is needed of one."""

    lock: threading.RLock
    forks: bool
    within: float | None
    gone: str | None

    def not_needed(self) -> None:
        """One that was asked for is not needed."""
        ...


class Forked:
    """A core that is asked of a fork server, with what is used of a `subprocess.Popen`. `pid` is 0 until it
    is there, and for ever where it never is. `forsaken` is why its fork server failed it, if it did."""

    def __init__(self, server: ForkServer, log: Path) -> None:
        self.pid = 0
        self.sentinel = -1
        self.forsaken: str | None = None
        self.unwanted = False
        self.server = server
        self._log = log
        self._settled = threading.Event()  # whether it is there or never will be
        self._over = threading.Event()
        self._code: int | None = None
        self._closed = False
        self._within = FORK_SECONDS if server.forks else server.within

    def known(self) -> bool:
        """Wait until it is there; False where it never will be, or nobody wants it any more."""
        # Asked twice: when the whole machine stood still, the first time was over at once.
        within = self._within
        settled = self._settled.wait(within) or self._settled.wait(within)
        if not settled and within is not None:
            self.forsaken = f"its fork server has not answered for {2 * within:g} s"
        return bool(self.pid)

    def poll(self) -> int | None:
        """The exit code, None while it runs or is awaited."""
        if not self._over.is_set() and self.sentinel >= 0 and ended(self.sentinel, 0.0):
            self._learn()
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises subprocess.TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        self._settled.wait(timeout)
        left = None if until is None else max(0.0, until - time.monotonic())
        if self.sentinel < 0:
            self._over.wait(left)
        elif not self._over.is_set() and ended(self.sentinel, left):
            self._learn()
        if self._code is None:
            raise subprocess.TimeoutExpired(CORE, timeout or 0.0)
        return self._code

    def _learn(self) -> None:
        """It has ended, and the word of it is under way; unless who would say it stands still."""
        if not self._over.wait(WORD_SECONDS):
            self.ended(exit_code(self.pid))

    def send_signal(self, number: int) -> None:
        """To this process alone; one that is gone gets none."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.sentinel, number)

    def kill_group(self) -> None:
        """End its whole process group now, or as soon as there is one."""
        with self.server.lock:
            self.unwanted = True
            if self.pid:
                kill_group(self.pid, self.sentinel)
            else:
                self._settled.set()  # a fork server that hangs never answers
                self.server.not_needed()

    def close(self) -> None:
        """Nobody looks at the sentinel any more, nor at one that comes late."""
        with self.server.lock:
            self._closed = True
            if self.sentinel >= 0:
                os.close(self.sentinel)
                self.sentinel = -1

    # -------------------------------------------------------------- what the fork server tells, by thread

    def begun(self, pid: int, sentinel: int) -> None:
        """It is there."""
        with self.server.lock:
            self.pid, self.sentinel = pid, sentinel
        self._settled.set()
        if self.unwanted:
            self.kill_group()
        if self._closed:
            self.close()

    def ended(self, code: int, words: str = "", forsaken: str | None = None) -> None:
        """It is gone, or never was; what is to be said of that goes into its log."""
        if words:
            with contextlib.suppress(OSError), self._log.open("a", errors="surrogateescape") as log:
                log.write(words)
        self.forsaken = self.forsaken or forsaken
        self._code = code
        self._over.set()
        self._settled.set()
