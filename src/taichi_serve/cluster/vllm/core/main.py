"""The program of one engine process: `python -m taichi_serve.cluster.vllm.core.main SPEC.json`.

On a CPU it is forked instead (forks.py), and from `run` on it is the same. The spec is written by process.py
into a directory that only its user can read. It holds vLLM's own command line and what differs from instance
to instance; nothing in it is pickled.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from taichi_serve.cluster.vllm.core.janitor import watch
from taichi_serve.cluster.vllm.naps import nap_between_looks
from taichi_serve.cluster.vllm.spec import Spec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor import Executor

PR_SET_PDEATHSIG = 1
# Seconds after which a thread that waits for the interpreter gets it. Where kernels are launched from Python
# the steps hold it nearly all the time, and words to and from the engine would wait for 5 ms, several times
# each. A move on an H100 took 3.1 ms with half a millisecond, and 2.4 with this (docs/log.md).
SWITCH_INTERVAL = 0.0001


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when the server's, `parent`, ends in whatever way."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)


def read(path: str) -> Spec:
    """The spec in this file."""
    return msgspec.json.decode(Path(path).read_bytes(), type=Spec)


def main(path: str) -> None:
    """An engine core that is a program of its own, and a child of the server."""
    spec = read(path)
    die_with_parent(spec.parent)
    run(path, spec)


def run(path: str, spec: Spec, forked: bool = False) -> None:
    """Build vLLM's configuration from the spec and run its engine core until told to stop."""
    mine = (Path(path).stem, spec.engine_id) if spec.shared else None
    watch(spec.parent, Path(path).parent, mine)
    # The terminal's Ctrl-C reaches the whole process group; the server alone decides when engines stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # vLLM leaves the file that its ranks meet at: in this directory it goes with the others.
    tempfile.tempdir = str(Path(path).with_suffix(""))

    # Only now what takes seconds to import: the server may be killed meanwhile. In a fork all of it is there.
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCoreProc

    from taichi_serve.cluster.vllm.args import engine_config
    from taichi_serve.cluster.vllm.core.calls import install
    from taichi_serve.cluster.vllm.core.ending import end_at_once
    from taichi_serve.cluster.vllm.sockets import dress_core

    if not current_platform.is_cpu():  # there the model runs in a process of its own
        sys.setswitchinterval(SWITCH_INTERVAL)
    else:
        nap_between_looks(shm_broadcast)
    if forked:
        from taichi_serve.cluster.vllm.worker.forked import fork_workers

        fork_workers(spec.argv)

    install()
    end_at_once()
    dress_core(Path(path).parent, spec.engine_id)
    if spec.shared:
        from taichi_serve.cluster.vllm.core.again import outlive

        outlive(Path(path).parent, spec.engine_id)
    config = engine_config(spec.argv, spec.engine_id, str(Path(path).parent))
    EngineCoreProc.run_engine_core(
        vllm_config=config,
        local_client=True,
        handshake_address=spec.handshake,
        executor_class=_executor(config),
        log_stats=True,
    )


def _executor(config: VllmConfig) -> type[Executor]:
    """What runs its workers."""
    from vllm.platforms import current_platform
    from vllm.v1.executor import Executor

    stock = Executor.get_class(config)
    if not current_platform.is_cpu():
        return stock
    from taichi_serve.cluster.vllm.core.executor import executor_of

    return executor_of(config, stock)


if __name__ == "__main__":
    main(sys.argv[1])
