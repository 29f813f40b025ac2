"""Who may stand in `taichi bench goodput --compare`: configurations of ours, vLLM's own server, and URLs."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from taichi_serve.commands.stock import proxied_flags, stock_flags
from taichi_serve.scheduling.policy import SERVE
from taichi_serve.slo import SLO

NAMES = ("aggregation", "disaggregation", "hybrid")
STOCK, STOCK_PD, STOCK_RR = STOCKS = "stock", "stock-pd", "stock-rr"
# What `taichi search --tuned` decides.
TUNED = ("p_heavy", "d_heavy", "p_chunk", "d_chunk", "ttft_margin", "tpot_margin", "watermark", "alpha")
# The model and the SLOs in its files are the measurement's own; all else in them is what an instance must be.
OWN = ("model", "ttft_slo", "tpot_slo")
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which ones, and how they are measured."""
    parser.add_argument(
        "--compare",
        metavar="NAMES",
        help=f"side by side: some of {','.join(NAMES)}; stock (vLLM's own server with data parallelism) and "
        "stock:192 (with that many tokens a step); stock-rr (so many of vLLM's own servers in "
        "turn); stock-pd (half of which prefill, with KV over NIXL); URLs of running servers",
    )
    parser.add_argument(
        "--contender",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help='one more, with these flags of taichi serve: "mine=--p-heavy 1 --d-heavy 1"; may be repeated',
    )
    parser.add_argument(
        "--redo",
        type=int,
        default=2,
        metavar="N",
        help="how often a round is done again while the machine's speed moves (default: 2)",
    )
    parser.add_argument(
        "--settle",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="load everybody for so long at the first rate before anything counts: with `--autotune on` a "
        "server chooses its sliders by what it has seen (default: 0)",
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="start all servers at the same time, where there are cores for it",
    )
    parser.add_argument(
        "--event-logs", type=Path, metavar="DIR", help="each of ours writes its events to DIR/NAME.jsonl"
    )
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """What those of ours are, and how many instances everybody has."""
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
class Contender:
    """Somebody to be measured: the flags of its server, or the URL of one that runs."""

    name: str
    kind: Literal["ours", "stock", "proxied", "url"]
    flags: tuple[str, ...] = ()
    url: str = ""
    instances: int = 1  # of vLLM's own server, or servers


@dataclass(frozen=True, slots=True)
class Words:
    """Words of `taichi serve`: what an instance is, which the user may overrule, and what is measured."""

    instance: tuple[str, ...]
    settings: tuple[str, ...]


def field(args: argparse.Namespace, flags: tuple[str, ...], slo: SLO) -> dict[str, Contender]:
    """All who were asked for, in that order, with the user's own flags; ValueError says what is wrong."""
    if args.redo < 0:
        raise ValueError(f"--redo: must be at least 0, not {args.redo}")
    if not 0 <= args.settle < float("inf"):
        raise ValueError(f"--settle: must be at least 0, not {args.settle:g}")
    slos = judged_by(slo)
    found: dict[str, Contender] = {}

    def add(option: str, contender: Contender) -> None:
        if contender.name in found:
            raise ValueError(f"{option}: {contender.name!r} is there twice")
        found[contender.name] = _logged(contender, args.event_logs)

    for asked in args.compare.split(",") if args.compare else ():
        if asked.startswith(("http://", "https://")):
            add("--compare", at(asked))
        elif asked.partition(":")[0] in STOCKS:
            add("--compare", _stock(asked, args.instances, flags))
        else:
            words = _of_ours(asked, args, slo)
            own = (*slos, *words.instance, *flags, *words.settings)
            add("--compare", Contender(asked, "ours", own))
    for asked in args.contender:
        name, more = _given(asked)
        add("--contender", Contender(name, "ours", (*slos, *flags, *more)))
    return found


def _logged(contender: Contender, folder: Path | None) -> Contender:
    """With an event log of its own, where one is asked for and it can write one."""
    if folder is None or contender.kind != "ours":
        return contender
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{contender.name}.jsonl"
    return replace(contender, flags=(*contender.flags, "--event-log", str(log)))


def judged_by(slo: SLO) -> tuple[str, ...]:
    """Words of `taichi serve`: this SLO, and all are served, as any other server does; the user's own flags
    come after them."""
    return "--ttft-slo", str(slo.ttft), "--tpot-slo", str(slo.tpot), "--overload", SERVE


def at(url: str) -> Contender:
    """A server that runs, named after its address."""
    return Contender(url.partition("://")[2].rstrip("/"), "url", url=url.rstrip("/"))


def _stock(asked: str, instances: int, flags: tuple[str, ...]) -> Contender:
    """From `stock`, or with tokens a step as in `stock:192`; the others of STOCKS alike."""
    kind, colon, said = asked.partition(":")
    if colon and not (said.isascii() and said.isdigit() and int(said) > 0):
        raise ValueError(f"--compare: {asked!r}: expected tokens a step after the colon, as in stock:192")
    least = 2 if kind == STOCK_PD else 1
    if instances < least:
        raise ValueError(f"--instances: must be at least {least}, not {instances}")
    chunk = int(said) if colon else None
    if kind != STOCK:
        prefill = instances // 2 if kind == STOCK_PD else 0
        return Contender(asked, "proxied", proxied_flags(flags, instances, prefill, chunk))
    return Contender(asked, "stock", stock_flags(flags, instances, chunk), instances=instances)


def _given(asked: str) -> tuple[str, tuple[str, ...]]:
    """Name and flags of --contender."""
    name, equals, said = asked.partition("=")
    if not (equals and NAME.fullmatch(name)):
        raise ValueError(f"--contender: {asked!r}: expected NAME=FLAGS, the name of letters and digits")
    try:
        return name, tuple(shlex.split(said))
    except ValueError as wrong:
        raise ValueError(f"--contender: {asked!r}: {wrong}") from None


def _of_ours(name: str, args: argparse.Namespace, slo: SLO) -> Words:
    """The words for one of NAMES; ValueError says what is wrong."""
    if name not in NAMES:
        raise ValueError(
            f"--compare: {name!r} is none of {', '.join(NAMES)}, {', '.join(STOCKS)} and "
            f"{STOCK}:TOKENS, and no URL"
        )
    if args.tuned is not None:
        return _tuned(args.tuned / f"{name}.yaml", slo)
    if args.instances < 2:
        raise ValueError(f"--instances: must be at least 2, not {args.instances}")
    return Words((), tuple(_words(name, args).split()))


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


def without_key(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The flags as they may be written down."""
    masked = (
        "***" if before == "--api-key" else word for before, word in zip(("", *flags), flags, strict=False)
    )
    return tuple("--api-key=***" if word.startswith("--api-key=") else word for word in masked)
