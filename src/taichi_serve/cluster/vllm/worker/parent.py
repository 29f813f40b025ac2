"""A worker ends with its engine core, however that ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_core() -> None:
    """Ask the kernel to end this worker when the core's thread that started it does: that is the main one,
    and it is there as long as the core. vLLM's own worker waits for a pipe to close, and then for whatever it
    is just doing. A worker inside the core's own process is the core."""
    core = multiprocessing.parent_process()
    if core is None or core.pid != os.getppid():
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != core.pid:  # it died before the call
        os._exit(1)
