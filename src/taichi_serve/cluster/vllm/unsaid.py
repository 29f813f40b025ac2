"""What a command line of `taichi serve` leaves unsaid, and what follows from what it says."""

from __future__ import annotations

import argparse

from taichi_serve.scheduling.policy import DEMOTE, SERVE
from taichi_serve.sliders import OFF, Sliders
from taichi_serve.slo import DEFAULT

SLIDERS = frozenset({"p_heavy", "d_heavy", "p_chunk", "d_chunk"})
# Of a command line with a slider; without one the server chooses (tuning/start.py).
DEFAULTS: dict[str, int | float | str] = {
    "p_heavy": 0,
    "d_heavy": 1,
    "p_chunk": 1024,
    "d_chunk": 256,
    "ttft_slo": DEFAULT.ttft,
    "tpot_slo": DEFAULT.tpot,
    "autotune": OFF,
}


def complete(args: argparse.Namespace) -> None:
    """Fill in the defaults. `args.said` has the names that needed none, `overload` among them, and
    `args.instances` what vLLM's flag of data parallelism says (None: nothing). Raises ValueError where the
    two contradict each other."""
    args.said = frozenset(name for name in (*DEFAULTS, "overload") if getattr(args, name) is not None)
    count, args.data_parallel_size = args.data_parallel_size, 1  # each instance is an engine of its own
    if count < 1:
        raise ValueError(f"--data-parallel-size must be at least 1, not {count}")
    args.instances = count if count > 1 else None
    if count > 1:
        _divide(args, count)
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.overload is None:
        args.overload = _overload(args)


def _overload(args: argparse.Namespace) -> str:
    """What becomes of requests that would be late: whoever has not said what late is loses none. vLLM's own
    order of priorities cannot be used with another order."""
    named = args.said & {"ttft_slo", "tpot_slo"} or args.slo_classes is not None
    return DEMOTE if named and args.scheduling_policy == "fcfs" else SERVE


def _divide(args: argparse.Namespace, count: int) -> None:
    """So many instances in all; of which kind is said, or they are D-heavy."""
    if args.d_heavy is None:
        args.d_heavy = max(0, count - (args.p_heavy or 0))
    elif args.p_heavy is None:
        args.p_heavy = max(0, count - args.d_heavy)
    p_heavy = args.p_heavy or 0
    if p_heavy + args.d_heavy != count:
        raise ValueError(
            f"--data-parallel-size {count} and --p-heavy {p_heavy} --d-heavy {args.d_heavy} are different "
            "numbers of instances: leave one of them out"
        )


def bare(args: argparse.Namespace) -> bool:
    """Whether a parsed command line names no slider."""
    return not args.said & SLIDERS


def sliders(args: argparse.Namespace) -> Sliders:
    """The sliders of a parsed command line. Without P-heavy instances their chunk is kept for the first that
    becomes P-heavy where it was said, and has no meaning else."""
    p_chunk = args.p_chunk
    if not args.p_heavy:  # a wrong d_chunk is said of d_chunk
        p_chunk = max(args.d_chunk, 0, args.p_chunk if "p_chunk" in args.said else 0)
    return Sliders(args.p_heavy, args.d_heavy, p_chunk, args.d_chunk)
