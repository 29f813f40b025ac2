"""An engine core that is a program of its own; and what a descriptor of its process says of any core."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from taichi_serve.cluster.vllm.server.remains import lives

CORE = "taichi_serve.cluster.vllm.core.main"


class Spawned(subprocess.Popen[bytes]):
    """A core that is a program of its own. `sentinel` can be read when it has ended. Only from the main
    thread, as it ends with the thread that started it. Raises OSError where there cannot be one."""

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
        try:
            self.sentinel = os.pidfd_open(self.pid)
        except OSError:
            self.kill()
            self.wait()
            raise

    def known(self) -> bool:
        """It is there."""
        return True

    def kill_group(self) -> None:
        """End its whole process group now."""
        kill_group(self.pid, self.sentinel)

    def close(self) -> None:
        """Nobody looks at the sentinel any more."""
        with contextlib.suppress(OSError):
            os.close(self.sentinel)


def ended(process: int, seconds: float | None) -> bool:
    """Whether the process behind this descriptor ends within so many seconds; None: it is waited for."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))


def kill_group(leader: int, sentinel: int) -> None:
    """End the process group of this leader. When that one has ended and a process has its number, this is
    somebody else: a number is given again once nobody of its group is left."""
    if ended(sentinel, 0.0) and lives(leader):
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
