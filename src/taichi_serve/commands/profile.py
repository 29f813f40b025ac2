"""`taichi profile`: measure real instances step by step, for `taichi serve --profile` to start from."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

from rich.console import Console

from taichi_serve.commands.helping import EachDefaultOnce
from taichi_serve.commands.installed import without_engines
from taichi_serve.commands.interrupts import Interrupts, Stopped
from taichi_serve.latency.profile import Profile, ProfileError
from taichi_serve.profiling.grid import Grid
from taichi_serve.profiling.probed import LostError


def make_parser() -> argparse.ArgumentParser:
    """Our own options; every other word is for the instances."""
    default = Grid()
    parser = argparse.ArgumentParser(
        prog="taichi profile",
        usage="taichi profile MODEL -o FILE [options] [any flag of taichi serve]",
        description="Measure how long the steps of an instance take, and how fast requests move between two "
        "instances. If it is interrupted, the same command goes on from FILE.part.",
        allow_abbrev=False,
        formatter_class=EachDefaultOnce,
    )
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the profile")
    parser.add_argument(
        "--no-moves",
        action="store_true",
        help="one instance is enough; the speed of moves stays unknown, and is learned while serving",
    )
    parser.add_argument(
        "--neighbours",
        type=int,
        default=0,
        metavar="N",
        help="so many more instances serve requests while one is measured: where they share a GPU, or the "
        "cores of a host (default: 0)",
    )
    _add_grid(parser, default)
    return parser


def _add_grid(parser: argparse.ArgumentParser, default: Grid) -> None:
    """Which cells are measured."""
    for name, text in (
        ("chunks", "prompt tokens in one step"),
        ("decodes", "decodes beside them"),
        ("contexts", "tokens that each decode begins with"),
        ("moves", "tokens of the requests that are moved"),
    ):
        value = getattr(default, name)
        usual = f"default: {','.join(map(str, value))}; what an instance cannot take is left out"
        parser.add_argument(
            f"--grid-{name}", type=_numbers, default=value, metavar="N,N", help=f"{text} ({usual})"
        )
    for name, text in (
        ("fill", "tokens of context that all decodes of a step begin with, at most"),
        (
            "repeats",
            "rounds through all of it; the median counts, and where rounds differ there are more",
        ),
    ):
        value = getattr(default, name)
        explained = f"{text} (default: {value})"
        parser.add_argument(f"--grid-{name}", type=int, default=value, metavar="N", help=explained)


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words.split(","))


def main(argv: list[str]) -> int:
    """`taichi profile` with these words; the exit status."""
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        grid = Grid(
            args.grid_chunks, args.grid_decodes, args.grid_contexts, args.grid_moves,
            args.grid_fill, args.grid_repeats,
        )  # fmt: skip
        _check_output(args.output)
        if args.neighbours < 0:
            raise ValueError(f"--neighbours must be at least 0, not {args.neighbours}")
    except ValueError as wrong:
        parser.error(str(wrong))
    if why := without_engines():
        parser.error(why)
    began = time.monotonic()
    try:
        profile = _measured(grid, args, words, console)
    except Stopped as stopped:
        part = args.output.with_name(args.output.name + ".part")
        console.print(f"profile: stopped; the same command goes on from {part}")
        return 128 + stopped.number
    except (LostError, ValueError, OSError, RuntimeError) as wrong:
        said = " ".join(str(wrong).split()) or type(wrong).__name__
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"taichi profile: {said}", markup=False)
        return 2 if isinstance(wrong, ProfileError) else 1
    report(profile, args.output, time.monotonic() - began, console)
    return 0


def _check_output(path: Path) -> None:
    """Raises ProfileError before anything is started: minutes of measuring must not end with it."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ProfileError(f"{path}: cannot be written")


def _measured(grid: Grid, args: argparse.Namespace, words: list[str], console: Console) -> Profile:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported: the console is ours
    from taichi_serve.commands.measuring import measured, task

    moves, neighbours = not args.no_moves, args.neighbours
    what = task(grid, args.output, [*words, *instances(moves, neighbours)], moves, neighbours)
    return asyncio.run(Interrupts().watch(measured(what, console)))


def instances(moves: bool, neighbours: int) -> tuple[str, ...]:
    """Flags for the instance that is measured and its neighbours; for moves it is P-heavy, and there is one
    to move to. How many there are of each kind is all the same: a kind is a chunk, and that can change."""
    if moves:
        return "--p-heavy", "1", "--d-heavy", str(max(1, neighbours))
    return "--p-heavy", "0", "--d-heavy", str(1 + neighbours)


def report(profile: Profile, path: Path, seconds: float, console: Console) -> None:
    """What was measured, and how well the step model fits it."""
    fit = profile.fit
    others = profile.settings.get("neighbours", 0)
    beside = f" beside {others} at work" if others else ""
    console.print(f"{path}: {profile.model} on {profile.device}{beside}, measured in {seconds:.0f} s")
    console.print(f"  KV    {profile.kv_capacity} tokens of {profile.bytes_per_token} bytes")
    console.print(
        f"  steps {len(profile.steps)}; held-out error {fit.error_median:.1%} at the median, "
        f"{fit.error_p95:.1%} at the 95th percentile"
    )
    for move in profile.transfers:
        more = 1000 * profile.bytes_per_token / move.bytes_per_second
        pair = f"{move.source.value} -> {move.target.value}"
        console.print(
            f"  {pair}: {move.latency * 1e3:.1f} ms, and {more * 1e3:.2f} ms for every 1,000 tokens"
        )
