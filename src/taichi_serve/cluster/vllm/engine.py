"""The program of one engine process: `python -m taichi_serve.cluster.vllm.engine SPEC.json`.

The spec is written by process.py into a directory that only its user can read. It holds vLLM's own command
line and what differs from instance to instance; nothing in it is pickled.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from taichi_serve.cluster.vllm.args import engine_config

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to end this process when the server's ends in whatever way."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)


def main(path: str) -> None:
    """Build vLLM's configuration from the spec and run its engine core until told to stop."""
    die_with_parent()
    # The terminal's Ctrl-C reaches the whole process group; the server alone decides when engines stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec: dict[str, Any] = json.loads(Path(path).read_text())

    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor import Executor

    config = engine_config(spec["argv"], spec["engine_id"], str(Path(path).parent))
    EngineCoreProc.run_engine_core(
        vllm_config=config,
        local_client=True,
        handshake_address=spec["handshake"],
        executor_class=Executor.get_class(config),
        log_stats=True,
    )


if __name__ == "__main__":
    main(sys.argv[1])
