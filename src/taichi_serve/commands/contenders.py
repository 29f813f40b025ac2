"""The configurations that `taichi bench goodput --compare` knows, as words of `taichi serve`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taichi_serve.slo import SLO

NAMES = ("aggregation", "disaggregation", "hybrid")
# What `taichi search --tuned` decides.
TUNED = ("p_heavy", "d_heavy", "p_chunk", "d_chunk", "ttft_margin", "tpot_margin", "watermark", "alpha")
# The model and the SLOs in its files are the measurement's own; all else in them is what an instance must be.
OWN = ("model", "ttft_slo", "tpot_slo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ones, and their sliders."""
    parser.add_argument("--compare", metavar="NAMES", help=f"some of {','.join(NAMES)}: one after the other")
    parser.add_argument(
        "--tuned", type=Path, metavar="DIR", help="their settings as `taichi search --tuned DIR` found them"
    )
    parser.add_argument("--instances", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="TOKENS", help="of aggregation (default: 512)"
    )
    parser.add_argument("--p-chunk", type=int, default=1024, metavar="TOKENS", help="P-heavy (default: 1024)")
    parser.add_argument(
        "--d-chunk", type=int, default=256, metavar="TOKENS", help="D-heavy, in the hybrid (default: 256)"
    )


@dataclass(frozen=True, slots=True)
class Words:
    """Words of `taichi serve`: what an instance is, which the user may overrule, and what is measured."""

    instance: tuple[str, ...]
    settings: tuple[str, ...]


def contenders(args: argparse.Namespace, slo: SLO) -> dict[str, Words]:
    """The words for each name asked for, in that order; ValueError says what is wrong."""
    asked = args.compare.split(",")
    for name in asked:
        if name not in NAMES:
            raise ValueError(f"--compare: {name!r} is none of {', '.join(NAMES)}")
    if args.tuned is not None:
        return {name: _tuned(args.tuned / f"{name}.yaml", slo) for name in asked}
    if args.instances < 2:
        raise ValueError(f"--instances: must be at least 2, not {args.instances}")
    return {name: Words((), tuple(_words(name, args).split())) for name in asked}


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


def _tuned(path: Path, slo: SLO) -> Words:
    """The settings in a file of `taichi search`, which must have looked for this SLO."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        limits = SLO(found["ttft_slo"], found["tpot_slo"])
        settings = _flags({key: found[key] for key in TUNED})
        instance = _flags({key: value for key, value in found.items() if key not in (*TUNED, *OWN)})
    except OSError as wrong:
        raise ValueError(f"--tuned: {path}: cannot be read: {wrong.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as wrong:
        raise ValueError(f"--tuned: {path}: is no config of `taichi search`: {wrong}") from None
    if limits != slo:
        raise ValueError(
            f"--tuned: {path}: was tuned for {limits.ttft:g} s and {limits.tpot * 1e3:g} ms, not for "
            f"{slo.ttft:g} s and {slo.tpot * 1e3:g} ms"
        )
    return Words(instance, settings)


def _flags(keys: dict[str, Any]) -> tuple[str, ...]:
    """Keys of a config file as words of a command line."""
    named = {f"--{key.replace('_', '-')}": value for key, value in keys.items() if value is not False}
    return tuple(
        w for flag, value in named.items() for w in ((flag,) if value is True else (flag, str(value)))
    )
