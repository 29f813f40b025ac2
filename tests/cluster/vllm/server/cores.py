"""Cores that are forked without vLLM, for tests: each runs the text that it is given."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from taichi_serve.cluster.vllm.server import forks
from taichi_serve.cluster.vllm.server.forked import Forked
from taichi_serve.cluster.vllm.server.forks import Forks, ForkServer
from taichi_serve.cluster.vllm.server.spawned import Spawned

HERE = Path(__file__).parent
SOURCE = Path(forks.__file__).parents[4]
SECONDS = 20.0
STAY = "import time; time.sleep(600)"
TELL = """
import json, os, random, resource, signal, sys
import numpy
said = {
    "env": dict(os.environ), "group": os.getpgid(0), "pid": os.getpid(),
    "argv": sys.argv[1:], "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "open": {f: os.readlink(f"/proc/self/fd/{f}") for f in os.listdir("/proc/self/fd") if int(f) < 3},
    "more": [f for f in os.listdir("/proc/self/fd") if int(f) >= 3],
    "chance": [random.random(), float(numpy.random.random())],
    "signals": [signal.getsignal(n).name for n in (signal.SIGTERM, signal.SIGCHLD)],
}
print(json.dumps(said), flush=True)
"""


class Cores:
    """Forks what it is given the text of."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: list[str] = []
        self.forks = Forks(directory, self.said.append)
        self.count = 0

    def begin(self, text: str, **env: str) -> Forked:
        core = self.any(text, **env)
        assert isinstance(core, Forked)
        return core

    def any(self, text: str, **env: str) -> Forked | Spawned:
        """A core of whichever kind."""
        self.count += 1
        spec = self.directory / f"i{self.count}.json"
        spec.write_text(text)
        return self.forks.begin(spec, self.log(), {**os.environ, **env})

    def server(self) -> ForkServer:
        """The fork server."""
        assert self.forks.server is not None
        return self.forks.server

    def log(self) -> Path:
        """That of the last one."""
        return self.directory / f"i{self.count}.log"

    def told(self, **env: str) -> dict[str, Any]:
        """What a core says of itself."""
        assert self.begin(TELL, **env).wait(SECONDS) == 0
        found: dict[str, Any] = json.loads(self.log().read_text())
        return found

    def running(self) -> Forked:
        """A core that stays."""
        core = self.begin(STAY)
        assert core.known()
        return core


def eventually(holds: Callable[[], Any]) -> bool:
    until = time.monotonic() + SECONDS
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(holds())


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
