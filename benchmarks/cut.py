"""Cut a recording out of the event log of a server that was loaded several times, with pauses between.

    python benchmarks/cut.py EVENTS.jsonl                    the loads in it, one a line
    python benchmarks/cut.py EVENTS.jsonl OUT.jsonl.gz --load N --sliders 2,2,8192,128
           --kv-capacity 55936 --slo 2 0.014 --device "four NVIDIA H200" [--block-size 16]

What a prefix cache holds is left out, and with it most of the bytes: the prompts of a load generator share
nothing. The first line says what the run was, as bench/recording.py reads it.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAUSE = 1.0  # seconds without a live request end a load
LEFT_OUT = ("Cached", "Tuned")
ENDS = ("Finished", "Cancelled")
Line = dict[str, Any]


def loads(lines: Iterable[str]) -> list[list[Line]]:
    """The facts of each load, in order: from its first request until all of them have ended."""
    found: list[list[Line]] = []
    live: set[str] = set()
    over = float("-inf")
    for line in lines:
        fact = json.loads(line)
        kind, about = fact["on"]
        if kind == "Arrived":
            if not live and about["at"] - over > PAUSE:
                found.append([])
            live.add(about["request"])
            about.pop("blocks", None)
        if found and live and kind not in LEFT_OUT:
            found[-1].append(fact)
        if kind in ENDS:
            live.discard(about["request"])
            over = about["at"]
        elif kind == "Tuned" and live:
            print(f"load {len(found)}: {about['why']}", file=sys.stderr)
    return found


def told(number: int, facts: list[Line]) -> str:
    """A load in words."""
    at = [fact["on"][1]["at"] for fact in facts if fact["on"][0] == "Arrived"]
    seconds = max(at[-1] - at[0], 1e-9)
    number_of = f"{len(at)} request{'s' * (len(at) != 1)}"
    return f"{number}: {number_of} in {seconds:.1f} s, {len(at) / seconds:.2f}/s, {len(facts)} facts"


def main() -> None:
    """Print the loads, or write one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--load", type=int, default=1, metavar="N", help="which one, from 1 on")
    parser.add_argument("--sliders", default="1,1,512,128", metavar="P,D,S_P,S_D")
    parser.add_argument("--kv-capacity", type=int, default=0, metavar="TOKENS", help="of each instance")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--slo", type=float, nargs=2, default=(2.0, 0.014), metavar=("TTFT", "TPOT"))
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    with args.log.open(encoding="utf-8") as log:
        found = loads(log)
    if args.out is None:
        print("\n".join(told(number, facts) for number, facts in enumerate(found, 1)))
        return
    facts = found[args.load - 1]
    sliders = dict(
        zip(("p_heavy", "d_heavy", "p_chunk", "d_chunk"), map(int, args.sliders.split(",")), strict=True)
    )
    head = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": args.device,
        "requests": sum(fact["on"][0] == "Arrived" for fact in facts),
        "sliders": sliders,
        "slo": args.slo,
        "block_size": args.block_size,
        "kv_capacity": [args.kv_capacity] * (sliders["p_heavy"] + sliders["d_heavy"]),
    }
    with gzip.GzipFile(args.out, "wb", mtime=0) as out:
        for line in (head, *facts):
            out.write((json.dumps(line) + "\n").encode())
    print(f"{args.out}: {told(args.load, facts)}, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
