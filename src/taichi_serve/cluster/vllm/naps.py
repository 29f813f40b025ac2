"""Who waits for a message of another process sleeps between two looks, on a CPU (decision 141).

vLLM's engine core and worker speak over shared memory, and for a second after each message the reader spins.
On a CPU a step takes milliseconds, and whoever spins meanwhile has a core that the server, or the worker that
it waits for, could use.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

NAP = 50e-6  # seconds; of a step that takes milliseconds
SLACK = 1_000  # nanoseconds by which the kernel may be late: a nap would be twice as long with its default
PR_SET_TIMERSLACK = 29


def nap_between_looks(ring: Any) -> None:
    """Change the readers of this process. `ring` is vLLM's module `shm_broadcast`, which yields by a function
    of its own. Threads and processes that this thread starts have its slack, too."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK)
    ring.sched_yield = _nap


def _nap() -> None:
    time.sleep(NAP)
