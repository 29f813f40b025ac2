"""A real `taichi serve` in a process of its own: start it, ask it, stop it, and see that nothing is left.

It listens on 127.0.0.1, keeps its files in a directory of its own, and gets the tiny model in float32.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from taichi_serve.bench.client import MANY
from taichi_serve.ports import port_of, reserve
from taichi_serve.tiny import cached_tiny_model

SOURCE = Path(__file__).parents[2] / "src"
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(SOURCE),
    # A server has a temporary directory of its own; what PyTorch compiles at its start is shared by all.
    "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
}
KV_BYTES = 256 << 20  # about 131,000 tokens of the tiny model in float32
FLAGS = (
    *("--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "4096", "--kv-cache-memory-bytes", str(KV_BYTES)),
)
START_SECONDS = 300
STOP_SECONDS = 60


def eventually(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """Ask until the answer is true, and return it; fail with `what` when the time is over."""
    until = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return answer


async def until(holds: Callable[[], Awaitable[Any]], seconds: float, what: str) -> Any:
    """Ask until the answer is true, and return it; fail with `what` when the time is over."""
    end = time.monotonic() + seconds
    while not (answer := await holds()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.02)
    return answer


class Server:
    """One server. Its constructor starts it and returns at once; `wait_ready` waits."""

    def __init__(
        self,
        directory: Path,
        *flags: str,
        model: str | Path | None = None,
        port: int | None = None,
        api_key: str | None = None,
        env: Mapping[str, str] | None = None,
        config: Path | None = None,
        host: str = "127.0.0.1",
        under: Sequence[str] = (),
    ) -> None:
        """With a file for `--config` the command line has this, the port and `flags` only. `under` are words
        before it, of a command that has it run at `host`."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.reserved = reserve()  # vLLM binds its port seconds from now
        self.port = port or port_of(self.reserved)
        self.host = host
        self.url = f"http://{host}:{self.port}"
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        key = ("--api-key", api_key) if api_key else ()
        usual = (str(model or cached_tiny_model()), *FLAGS) if config is None else ("--config", str(config))
        there = ("--host", host) if under else ()
        words = [*usual, "--port", str(self.port), *there, *key, *flags]
        self.log = directory / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*under, sys.executable, "-m", "taichi_serve.cli", "serve", *words],
                env={**os.environ, **ENVIRONMENT, "TMPDIR": str(directory), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def said(self) -> str:
        """Everything it wrote so far."""
        return self.log.read_text(errors="replace")

    def lines(self) -> list[str]:
        """What it said to its operator."""
        return [line for line in self.said().splitlines() if line.startswith("taichi: ")]

    def wait_ready(self) -> Server:
        """Wait until it says that it is ready; its log is in the failure message."""

        def ready() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self._tail()}"
            return "taichi: ready on " in self.said()

        try:
            eventually(ready, START_SECONDS, "the server is ready")
        except AssertionError as late:
            raise AssertionError(f"{late}\n{self._tail()}") from None
        return self

    def _tail(self) -> str:
        engines = [p.read_text(errors="replace")[-3000:] for p in self.directory.glob("taichi-*/*.log")]
        return "\n---- an engine:\n".join([self.said()[-4000:], *engines])

    def client(self, timeout: float = 300.0) -> httpx.AsyncClient:
        """A client that may have any number of requests open."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self.headers,
            timeout=timeout,
            limits=MANY,
        )

    def state(self) -> dict[str, Any]:
        """GET /taichi/state."""
        answer = httpx.get(f"{self.url}/taichi/state", headers=self.headers, timeout=30)
        answer.raise_for_status()
        state: dict[str, Any] = answer.json()
        return state

    def instance(self, name: str) -> dict[str, Any]:
        """One instance of the state."""
        return next(i for i in self.state()["instances"] if i["name"] == name)

    def quiet(self, seconds: float = 2.0) -> dict[str, Any]:
        """Wait until no request is live and no KV is held, and return the state."""
        state: dict[str, Any] = {}

        def empty() -> bool:
            nonlocal state
            state = self.state()
            held = any(i["kv_tokens"] for i in state["instances"] if i["alive"])
            return not held and state["requests"]["live"] == 0

        try:
            eventually(empty, seconds, "no request is live and no KV is held")
        except AssertionError as late:
            raise AssertionError(f"{late}: {state}") from None
        return state

    def family(self) -> list[psutil.Process]:
        """The server's process and every process below it."""
        this = psutil.Process(self.process.pid)
        return [this, *this.children(recursive=True)]

    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm that its processes have mapped."""
        found = set()
        for process in self.family():
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {
                Path(line.split()[5]) for line in maps if "/dev/shm/" in line and "(deleted)" not in line
            }
        return found

    def signal(self, number: int) -> None:
        """Send the server a signal."""
        self.process.send_signal(number)

    def stop(self, code: int = 0, logs_stay: bool = False) -> None:
        """SIGTERM; it must exit with `code` and leave no process, socket, directory or shared memory."""
        family, shared = self.family(), self.shared_memory()
        self.signal(signal.SIGTERM)
        self.gone(code, family, shared, logs_stay)

    def gone(
        self,
        code: int,
        family: list[psutil.Process],
        shared: set[Path] = frozenset(),
        logs_stay: bool = False,
    ) -> None:
        """Wait for its end, and look for what it might have left."""
        self.reserved.close()
        try:
            assert self.process.wait(STOP_SECONDS) == code, self._tail()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not stop within {STOP_SECONDS} s:\n{self._tail()}") from None
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, f"left running: {alive}"
        left = [path for path in self.directory.rglob("*") if path.is_socket()]
        left += self.directory.glob("vllm*")
        ours = [
            path for path in self.directory.glob("taichi-*/*") if not (logs_stay and path.suffix == ".log")
        ]
        assert not left + ours, f"left behind: {left + ours}"
        assert logs_stay or not list(self.directory.glob("taichi-*"))
        sockets = Path("/proc/net/unix").read_text()
        assert str(self.directory) not in sockets, "a unix socket is left"
        assert not [path for path in shared if path.exists()], "shared memory is left"
        with socket.socket() as probe:
            assert probe.connect_ex((self.host, self.port)) != 0, "the port still answers"

    def end(self) -> None:
        """End whatever is left of it, however the test went."""
        self.reserved.close()
        if self.process.poll() is None:
            family = self.family()
            for process in family:
                process.resume() if process.is_running() else None
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                for process in family:
                    if process.is_running():
                        process.kill()
        self.process.wait()


def processes(server: Server, name: str) -> list[psutil.Process]:
    """Those of one instance: the engine core and its workers."""
    core = psutil.Process(server.instance(name)["pid"])
    return [core, *core.children(recursive=True)]


def workers(core: psutil.Process) -> list[psutil.Process]:
    """Of an engine core, without its janitor."""
    below = core.children(recursive=True)
    return [p for p in below if p.is_running() and "core.main" not in " ".join(p.cmdline())]
