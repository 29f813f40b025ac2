"""An engine core that was asked to stop, and has nothing left to compute, ends at once.

vLLM's own teardown gives memory and devices back piece by piece and waits for every worker to do the same,
for up to nine seconds. The kernel gives back all of it with the process: it ends the workers with their core
(worker/parent.py), and the server removes the files and the shared memory of both (server/process.py).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from vllm.v1.engine import core

MARK = "_taichi_stock_shutdown"


def end_at_once(kind: Any = core.EngineCoreProc) -> None:
    """Change this class of engine cores, once. One that fails, or still computes, is torn down as before."""
    if hasattr(kind, MARK):
        return
    stock = kind.shutdown
    setattr(kind, MARK, stock)

    def shutdown(self: Any) -> None:
        asked = self.shutdown_state is core.EngineShutdownState.SHUTTING_DOWN
        if asked and not self.has_work():
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        stock(self)

    kind.shutdown = shutdown
