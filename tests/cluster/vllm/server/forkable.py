"""A fork server for tests: what it forks runs the Python file that is its spec, and vLLM is not imported."""

from __future__ import annotations

import os
import runpy
import sys
from types import SimpleNamespace

from taichi_serve.cluster.vllm.core import forks

forks.MODULES = tuple(os.environ.get("FORKABLE_MODULES", "numpy").split())
forks.read = str
forks.run = lambda path, spec, forked: runpy.run_path(path)

if "FORKABLE_FORBIDDEN" in os.environ:

    def forbidden(*args: object) -> int:
        raise PermissionError(1, "not permitted")

    if os.environ["FORKABLE_FORBIDDEN"] == "fork":
        forks.watch = lambda server, directory: None
    else:
        forks.os = SimpleNamespace(**vars(os))
    setattr(forks.os, os.environ["FORKABLE_FORBIDDEN"], forbidden)

if __name__ == "__main__":
    forks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
