"""One process of a front end: started with a file that says all, ended with the group that it leads."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from taichi_serve.frontend.several.words import Spec

METRICS = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client keeps the metrics of several processes


class FrontEndProcess:
    """It inherits the socket that all front ends listen on, and writes where the server writes."""

    def __init__(self, spec: Spec, path: Path, metrics: Path) -> None:
        """The spec is written to `path`; `metrics` is the directory in which each keeps its own."""
        path.write_bytes(msgspec.json.encode(spec))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "taichi_serve.frontend.several.main", str(path)],
            env={**os.environ, METRICS: str(metrics)},
            stdin=subprocess.DEVNULL,
            pass_fds=(spec.listening,),
            process_group=0,  # the terminal's Ctrl-C is the server's alone
        )
        self.pid = self._process.pid
        self._path = path

    def wait(self) -> int:
        """Wait for its end; its exit status. Nothing of it is left afterwards."""
        code = self._process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # whatever it started
        self._path.unlink(missing_ok=True)
        return code

    def terminate(self) -> None:
        """Ask it to take no new requests, to finish those that are open, and to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it now."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)
