"""A cluster of Ray on hosts that are pretended: one raylet in each namespace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from hosts import Host
from servers import ENVIRONMENT

PORT = 6379
RAY = (*("--disable-usage-stats", "--include-log-monitor", "false", "--object-store-memory", "80000000"),)
SETTINGS = {
    **ENVIRONMENT,
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "false",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # A node that is gone is known to be within seconds, not half a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Node:
    """A raylet on a host, with all that it started."""

    def __init__(self, host: Host, directory: Path, slots: int, head: str | None, core: int) -> None:
        """With room for so many instances. Without `head`, the address of one, it is one."""
        self.host, self.directory, self.slots, self.core = host, directory, slots, core
        self.head = head or f"{host.address}:{PORT}"
        self.dead = False
        first = ("--head", "--port", str(PORT), "--include-dashboard", "false")
        join = first if head is None else ("--address", head)
        words = (*join, "--node-ip-address", host.address, "--num-cpus", str(slots), *RAY)
        # A file of a socket has a short path.
        place = ("--temp-dir", f"/tmp/r{os.getpid()}") if head is None else ()
        done = subprocess.run(
            host.within(sys.executable, "-m", "ray.scripts.scripts", "start", *words, *place),
            env={**os.environ, **SETTINGS, **self._own()},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _own(self) -> Mapping[str, str]:
        self.directory.mkdir(parents=True, exist_ok=True)
        return {"TMPDIR": str(self.directory), "VLLM_CPU_OMP_THREADS_BIND": str(self.core)}

    def kill(self) -> None:
        """As if its power were cut: nothing on the network hears that its processes end."""
        self.dead = True
        self.host.cut()
        for pid in _pids(self.host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def engines(self) -> list[str]:
        """Names of the processes of engines that run there."""
        named = []
        for pid in _pids(self.host):
            with contextlib.suppress(OSError):
                named.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return [name for name in named if "VLLM::" in name or "vllm.core.main" in name]


def _pids(host: Host) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


@contextlib.contextmanager
def ended(nodes: list[Node]) -> Iterator[list[Node]]:
    """Whatever runs on these is killed in the end."""
    try:
        yield nodes
    finally:
        for node in nodes:
            for pid in _pids(node.host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
