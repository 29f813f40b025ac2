"""`taichi serve` as a child process: start it, hear what it says, stop it so that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from taichi_serve.ports import LOOPBACK, port_of, reserve

PR_SET_PDEATHSIG = 1
STOP_SECONDS = 20.0  # the server itself gives an engine ten seconds
SAYS = "taichi: "
READY = "ready on "


class ServerError(RuntimeError):
    """The server ended before it was ready, or did not end well. The message is its own last word."""


class Subserver:
    """A server of our own on loopback, in a scratch directory that is its TMPDIR and holds its log.

    Its process group is its own: Ctrl-C in a terminal reaches its owner, which decides when it stops.
    """

    module: tuple[str, ...] = ("taichi_serve.cli", "serve")

    def __init__(self, words: list[str], env: Mapping[str, str] | None = None) -> None:
        """Start it with these words, a MODEL first, and this in its environment; host and port are chosen
        here."""
        self.directory = Path(tempfile.mkdtemp(prefix="taichi-own-"))  # mode 0700
        self.log = self.directory / "server.log"
        self._port = reserve()  # the server binds it seconds from now
        self.url = f"http://{LOOPBACK}:{(port := port_of(self._port))}"
        command = [sys.executable, "-m", *self.module, *words]
        command += ["--host", LOOPBACK, "--port", str(port)]
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TMPDIR": str(self.directory)}
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    env={**os.environ, **quiet, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    preexec_fn=_stop_with_parent,  # noqa: PLW1509  (no threads yet: it runs right after the fork)
                )
        except BaseException:
            self._port.close()
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    async def sayings(self) -> AsyncIterator[str]:
        """What the server says about itself, line by line, until it is ready. Raises ServerError."""
        last, rest = "it said nothing", ""
        with self.log.open(encoding="utf-8", errors="replace") as log:
            while True:
                ended = self._process.poll()
                *lines, rest = (rest + log.read()).split("\n")
                for line in lines:
                    if line.startswith(SAYS):
                        last = line.removeprefix(SAYS)
                        yield last
                        if last.startswith(READY):
                            return
                    elif line.strip() and not last.startswith("waiting"):
                        last = line if "Error" in line else last
                if ended is not None:
                    raise ServerError(f"the server ended with exit code {ended}: {last}")
                await asyncio.sleep(0.1)

    def stop(self, keep: bool) -> int:
        """Stop it and wait until it is gone; its directory goes too, unless it is to be kept. Exit status."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its engines die with it
            self._process.wait()
        self._port.close()
        if not keep:
            shutil.rmtree(self.directory, ignore_errors=True)
        return self._process.returncode


def _stop_with_parent() -> None:
    """Ask the kernel to stop the server when its owner ends in whatever way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
