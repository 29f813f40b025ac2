"""The program of one front end: `python -m taichi_serve.frontend.several.main SPEC.json`.

vLLM's own API server, around an engine client whose cluster is in the server's process.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path

import msgspec

from taichi_serve.frontend.several.words import Spec, Welcome

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when the server's, `parent`, ends in whatever way."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit(1)


async def run(spec: Spec, args: argparse.Namespace) -> None:
    """Serve until told to stop."""
    from vllm.v1.engine import EngineCoreOutputs

    from taichi_serve.frontend.several.line import Line
    from taichi_serve.frontend.several.outside import serve

    line = Line(spec.line, EngineCoreOutputs)
    welcome, _ = await line.hear()
    assert isinstance(welcome, Welcome)
    await serve(spec, args, line, welcome)


def main(path: str) -> None:
    """Be the front end that the spec describes."""
    spec = msgspec.json.decode(Path(path).read_bytes(), type=Spec)
    die_with_parent(spec.parent)

    # Only now what takes seconds to import: the server may be killed meanwhile.
    import uvloop
    from vllm.utils.system_utils import decorate_logs

    from taichi_serve.cluster.vllm import args as flags
    from taichi_serve.frontend.precheck import precheck

    decorate_logs(f"FrontEnd_{spec.index}")
    args = flags.parse(spec.argv)
    precheck(args)  # it loads plugins
    uvloop.run(run(spec, args))


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not by way of the interpreter's teardown: it takes seconds, and nothing is left to save
