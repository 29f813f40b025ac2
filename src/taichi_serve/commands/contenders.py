"""The configurations that `taichi bench goodput --compare` knows, as words of `taichi serve`."""

from __future__ import annotations

import argparse

NAMES = ("aggregation", "disaggregation", "hybrid")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ones, and their sliders."""
    parser.add_argument("--compare", metavar="NAMES", help=f"some of {','.join(NAMES)}: one after the other")
    parser.add_argument("--instances", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="TOKENS", help="of aggregation (default: 512)"
    )
    parser.add_argument("--p-chunk", type=int, default=1024, metavar="TOKENS", help="P-heavy (default: 1024)")
    parser.add_argument(
        "--d-chunk", type=int, default=256, metavar="TOKENS", help="D-heavy, in the hybrid (default: 256)"
    )


def contenders(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The words for each name asked for, in that order; ValueError says what is wrong."""
    asked = args.compare.split(",")
    for name in asked:
        if name not in NAMES:
            raise ValueError(f"--compare: {name!r} is none of {', '.join(NAMES)}")
    if args.instances < 2:
        raise ValueError(f"--instances: must be at least 2, not {args.instances}")
    return {name: tuple(_words(name, args).split()) for name in asked}


def _words(name: str, args: argparse.Namespace) -> str:
    """Half of the instances are P-heavy, where there are such."""
    if name == "aggregation":
        return f"--p-heavy 0 --d-heavy {args.instances} --d-chunk {args.chunk}"
    p_heavy = args.instances // 2
    split = f"--p-heavy {p_heavy} --d-heavy {args.instances - p_heavy} --p-chunk {args.p_chunk}"
    # No degrading: in disaggregation a decode stays where it is.
    return (
        f"{split} --d-chunk 0 --watermark 1"
        if name == "disaggregation"
        else f"{split} --d-chunk {args.d_chunk}"
    )
