"""What vLLM has moved or given another form between the versions that this code knows, in one place.

0.32 is pinned and served. 0.33 comes next: the contract tests also run against its Python sources
(scripts/contract.py), and docs/vllm.md says what else it needs. What a version merely adds stands where vLLM
looks for it: calls of its client in frontend/everywhere.py, `expedited` in worker/offload.py.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# By name, the modules that have it: those of 0.32 first, then of 0.33.
PLACES = {
    "make_arg_parser": ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args"),
    "validate_parsed_serve_args": ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args"),
    "cli_env_setup": ("vllm.entrypoints.serve.utils.api_utils", "vllm.entrypoints.common.startup"),
}

Rows: TypeAlias = NDArray[np.uint64]

ADDRESS, COUNT, STRIDE = 0, 4, 3  # columns of 0.33's rows: address, bytes, device, stride, count
FAILS = 'data: {"error"'  # how an error begins in 0.32's streams of OpenAI's route


def __getattr__(name: str) -> Any:
    """A name of PLACES, from where this vLLM has it. Raises ImportError where it has moved again."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for place in PLACES[name]:
        try:
            module = import_module(place)
        except ModuleNotFoundError as missing:
            if missing.name is None or not place.startswith(missing.name):
                raise  # the place is there, and lacks something itself
            continue
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"vLLM has {name} in none of {', '.join(PLACES[name])}", name=name)


def block_rows(given: Any) -> Rows:
    """One row (address, bytes, device) for each block of a NIXL list.

    0.32 gives such rows, (n, 3). 0.33 gives (m, 5), one for each region of memory: its blocks lie `stride`
    bytes apart, `count` of them, and are numbered region after region.
    """
    rows = np.asarray(given, dtype=np.uint64)
    if rows.ndim != 2 or rows.shape[1] != COUNT + 1:
        return rows
    counts = rows[:, COUNT].astype(np.int64)
    flat = np.repeat(rows[:, :STRIDE], counts, axis=0)
    within = np.arange(len(flat), dtype=np.uint64) - np.repeat(np.cumsum(counts) - counts, counts).astype(
        np.uint64
    )
    flat[:, ADDRESS] += within * np.repeat(rows[:, STRIDE], counts)
    return flat


def says_no(flag: str, action: argparse.Action) -> bool:
    """Whether this name of a switch turns it off: `--no-enable-x`, which in 0.33 is still understood, but
    among the switch's names it is called `--disable-x` there."""
    return flag.startswith("--no-") or flag in getattr(action, "negative_option_strings", ())


def error_of(item: Any) -> str | None:
    """What an item of a stream of OpenAI's route says of an error, as JSON; None where it is another item.

    Items are lines of text in 0.32, and objects in 0.33, where an error is vLLM's ErrorResponse.
    """
    if isinstance(item, str):
        return item.removeprefix("data: ") if item.startswith(FAILS) else None
    said = getattr(item, "error", None)
    return None if said is None else str(item.model_dump_json())
