"""Who waits for a message of another process looks again and again for a moment, and then naps between two
looks, on a CPU (decision 141).

vLLM's engine core and worker speak over shared memory, and for a second after each message the reader spins.
On a CPU a step takes milliseconds, and whoever spins meanwhile has a core that the server, or the worker that
it waits for, could use. What comes within a moment, as the answer of a worker that samples does, is met at
once: a nap before each of the four messages of a step would cost it a hundredth.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

SPIN = 2e-3  # seconds of a wait before the first nap: what the other one does between two steps takes 1.3 ms
NAP = 50e-6  # seconds; of a step that takes milliseconds
SLACK = 1_000  # nanoseconds by which the kernel may be late: a nap would be twice as long with its default
PR_SET_TIMERSLACK = 29


def nap_exactly() -> None:
    """Naps of this thread, and of what it starts, end when they are to, not 50 us later."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK)


def nap_between_looks(ring: Any) -> None:
    """Change the readers of this process. `ring` is vLLM's module `shm_broadcast`, whose SpinCondition is
    asked to wait after each look that found nothing. Threads and processes that this thread starts have its
    slack, too."""
    nap_exactly()
    ring.SpinCondition.wait = _waits(ring.SpinCondition.wait)


def _waits(idle: Any) -> Any:
    """The method of a reader; `idle` is vLLM's own, which awaits a bell once nothing came for a second."""

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        now = time.monotonic()
        if now > self.last_read + self.busy_loop_s:
            idle(self, timeout_ms)
        elif getattr(self, "taichi_last", None) != self.last_read:  # the first look since a message
            self.taichi_last, self.taichi_until = self.last_read, now + SPIN
            os.sched_yield()
        elif now < self.taichi_until:
            os.sched_yield()
        else:
            time.sleep(NAP)

    return wait
