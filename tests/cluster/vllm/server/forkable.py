"""A fork server for tests: what it forks runs the Python file that is its spec, and vLLM is not imported."""

from __future__ import annotations

import os
import runpy
import sys

from taichi_serve.cluster.vllm.core import forks

forks.MODULES = tuple(os.environ.get("FORKABLE_MODULES", "numpy").split())
forks.read = str
forks.run = lambda path, spec, forked: runpy.run_path(path)

if "FORKABLE_FULL" in os.environ:

    def fork() -> int:
        raise BlockingIOError("too many processes")

    os.fork = fork

if __name__ == "__main__":
    forks.main(int(sys.argv[1]), int(sys.argv[2]))
