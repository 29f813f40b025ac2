"""Ours against stock vLLM on the same GPUs: both servers of a pair are up, and loaded in turn.

    scripts/gpu.sh versus OUT [STAGE ...] [--gpus 2] [--shape 14b] [--workloads long,chat,...]
    scripts/gpu.sh versus OUT --rehearse          the same on a CPU with a tiny model, in small

It is a row of `taichi bench goodput --compare`, each in a folder of OUT, with what GPUs need: a model of a
real shape without weights, graphs, and KV that leaves room for two servers on each card. Stages, in order:

  tune    the chunk with which stock is best for the SLO of each workload: neighbours are compared, uphill
  search  settings of our three ways of serving (`taichi search --tuned`; with --profile; it needs no GPU)
  pairs   ours (aggregation, disaggregation, hybrid, auto: without any slider) and stock's own prefill/decode
          disaggregation, each beside stock as it was tuned; or all of --together in one comparison

A call ends after --seconds, as at Ctrl-C, with exit code 3 where something is left: the same call goes on
with the next round. At its end it prints the table of all pairs so far, which is OUT/table.md too. With
--share N instances are on one card (under MPS), and stock is as many servers in turn: a single card takes no
data-parallel size. Where two servers do not fit on a card one at a time is up.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import NO_WEIGHTS, QWEN_7B, QWEN_14B, keep_logs, shape
from standings import ahead, table, tuning, uphill

from taichi_serve.bench.kept import read
from taichi_serve.commands.compare import FILE
from taichi_serve.commands.gpus import Gpus
from taichi_serve.commands.proxied import groups
from taichi_serve.tiny import cached_tiny_model

SHAPES = {"7b": ("Qwen2.5-7B", QWEN_7B), "14b": ("Qwen2.5-14B", QWEN_14B)}
# Of captured graphs: vLLM's own up to 256, where D-heavy instances work. A step is padded to the next one:
# with 160 after 128 a chunk of 128 beside four decodes took a tenth longer (docs/results.md).
SIZES = [1, 2, 4, *range(8, 257, 8), *range(288, 513, 32)]
CHUNKS, SMALL_CHUNKS, FIRST = (192, 256, 384, 512, 768, 1024, 1536, 2048), (64, 256), 256
OURS, SPLIT, SMALL_SPLIT = ("aggregation", "disaggregation", "hybrid", "auto"), "stock-pd:8192", "stock-pd"
STAGES = ("tune", "search", "pairs")
LEFT = 3
STOP_SECONDS = 90.0  # what servers may take to stop
LEAST_SECONDS = 60.0  # less is not enough to begin anything with


@dataclass(frozen=True, slots=True)
class Load:
    """A workload, its SLO (seconds), the first rate that is tried (requests/s), and whose settings and chunk
    are used for it: of another one of LOADS, or its own."""

    workload: str
    ttft: float
    tpot: float
    start: float
    tuned: str = ""
    more: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """What is asked, as options of `taichi`."""
        slo = ["--ttft-slo", f"{self.ttft:g}", "--tpot-slo", f"{self.tpot:g}"]
        return ["--workload", self.workload, *slo, *self.more]

    def as_said(self, args: argparse.Namespace) -> Load:
        """With the SLO and the first rate of the command line, where it has them."""
        ttft, tpot = args.ttft_slo or self.ttft, args.tpot_slo or self.tpot
        return replace(self, ttft=ttft, tpot=tpot, start=args.start or self.start)


LOADS = {
    "long": Load("3658/100", 2.0, 0.018, 6.0),
    "chat": Load("661/257", 1.0, 0.018, 16.0),
    # Everybody but `auto` is as for its first third, and again for its last one.
    "change": Load("change:3658/100@1,661/257@3,3658/100@1", 2.0, 0.018, 8.0, "long"),
    "bursts": Load("3658/100", 2.0, 0.018, 4.0, "long", ("--cv", "2")),
    "conversations": Load("conversations:share=0.85", 1.0, 0.025, 8.0),
}
SMALL = {
    "long": Load("400/20", 2.0, 0.06, 8.0),
    "chat": Load("80/40", 1.0, 0.06, 8.0),
    "change": Load("change:400/20@1,80/40@2,400/20@1", 2.0, 0.06, 8.0, "long"),
    "bursts": Load("400/20", 2.0, 0.06, 8.0, "long", ("--cv", "2")),
    "conversations": Load("conversations:share=0.5,turns=2,think=1", 2.0, 0.06, 2.0),
}


class Field:
    """What is compared with what, in which folders; and the calls that do it."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        self.args, self.model, self.out = args, model, args.out
        loads = SMALL if args.rehearse else LOADS
        self.loads = {name: load.as_said(args) for name, load in loads.items()}
        self.instances: int = args.share or args.gpus // args.tensor_parallel_size
        # Where instances share a card there is no data parallelism: as many servers take turns.
        self.stock = "stock-rr" if args.share else "stock"
        self.ends = time.monotonic() + args.seconds

    def tune(self, name: str) -> bool:
        """The chunk of stock for a workload; whether it is known."""
        sizes = ["--requests", str(self.args.tuning), "--warm-up", str(min(20, self.args.warm_up))]
        sizes += ["--seeds", "0"]
        while not isinstance(found := self.chunk(name), int):
            both = [f"{self.stock}:{chunk}" for chunk in sorted(found)]
            if not self._compared(self.loads[name].tuned or name, tuning(*found), both, sizes):
                return False
        print(f"{name}: stock is best with chunk {found}", flush=True)
        return True

    def chunk(self, name: str) -> int | tuple[int, int]:
        """The best one as far as it is known, or which two are to be compared."""
        folder = self.out / (self.loads[name].tuned or name)

        def better(first: int, second: int) -> bool | None:
            kept = read(folder / tuning(first, second) / FILE)
            names = f"{self.stock}:{first}", f"{self.stock}:{second}"
            return None if kept is None else ahead(kept.contest, *names)

        return uphill(better, SMALL_CHUNKS if self.args.rehearse else CHUNKS, FIRST)

    def search(self, name: str) -> bool:
        """Our settings for a workload, from a profile; whether they are there."""
        load, folder = self.loads[name], self.out / name / "tuned"
        if load.tuned or not self.args.profile or (folder / "hybrid.yaml").is_file():
            return True
        words = ["search", *load.words, "--profile", self.args.profile, "--tuned", str(folder)]
        return self._called([*words, "--instances", str(self.instances)])

    def pairs(self, name: str) -> bool:
        """Every contender beside stock, or all that were named together; whether all is known."""
        args, done = self.args, True
        sizes = ["--requests", str(args.requests), "--warm-up", str(args.warm_up), "--seeds", args.seeds]
        if args.together:
            return self._compared(name, "together", args.together.split(","), sizes)
        chunk = self.chunk(name)
        if not isinstance(chunk, int):
            print(f"{name}: stock is not tuned yet (stage tune)", flush=True)
            return False
        for one in (SMALL_SPLIT if args.rehearse else SPLIT, *OURS):
            kind = one.partition(":")[0]
            if not args.contenders or kind in args.contenders.split(","):
                done = self._compared(name, kind, [f"{self.stock}:{chunk}", one], sizes) and done
        return done

    # --------------------------------------------------------------------------------------------- calls

    def _compared(self, name: str, folder: str, contenders: Sequence[str], sizes: Sequence[str]) -> bool:
        """Compare these under a workload, in a folder of it; whether that is done."""
        load, args = self.loads[name], self.args
        asked = [one for one in contenders if one != "auto"]
        words = ["bench", "goodput", str(self.model), *load.words, "--start", f"{load.start:g}", *sizes]
        words += ["--tolerance", str(args.tolerance), "--step", str(args.step)]
        words += ["--out", str(self.out / name / folder), "--instances", str(self.instances)]
        words += ["--compare", ",".join(asked), *self._settings(name)]
        words += ["--contender", "auto="] if "auto" in contenders else []
        # The probes see the host's cores and nothing of GPUs: there no round is done again for them.
        words += ["--redo", "1" if args.rehearse else "0", "--settle", f"{args.settle:g}"]
        words += ["--event-logs", str(self.out / name / folder)] if args.event_logs else []
        # A host of GPUs has cores for all of them.
        words += [] if args.rehearse else ["--at-once"]
        print(f"{name}: {' and '.join(contenders)}", flush=True)
        return self._called([*words, "--", *(SMALL_FLAGS if args.rehearse else self._flags())])

    def _settings(self, name: str) -> list[str]:
        """Of our three ways of serving: as searched, or as said."""
        searched = self.out / (self.loads[name].tuned or name) / "tuned"
        if (searched / "hybrid.yaml").is_file():
            return ["--tuned", str(searched)]
        aggregation, p_chunk, d_chunk = self.args.settings.split(",")
        return ["--chunk", aggregation, "--p-chunk", p_chunk, "--d-chunk", d_chunk]

    def _flags(self) -> list[str]:
        """What all servers have in common; stock gets those that are vLLM's."""
        args = self.args
        ranks = args.tensor_parallel_size
        devices = ["0"] * self.instances if args.share else groups(None, self.instances, ranks)
        graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}
        # Several servers are on each card and see each other's memory: they are told what is theirs.
        flags = ["--gpu-memory-utilization", args.memory, "--kv-cache-memory-bytes", args.kv or kv()]
        flags += ["--devices", ";".join(devices)]
        flags += ["--tensor-parallel-size", str(ranks), "--max-model-len", "16384", "--max-num-seqs", "128"]
        flags += ["--api-server-count", str(args.front_ends)] if args.front_ends else []
        flags += ["--disable-uvicorn-access-log", *([] if args.model else NO_WEIGHTS)]
        return [*flags, "--compilation-config", json.dumps(graphs)]

    def _called(self, words: Sequence[str]) -> bool:
        """`taichi` with these words, stopped as at Ctrl-C when the time is over; whether it came to its
        end."""
        if (seconds := self.ends - time.monotonic()) < LEAST_SECONDS:
            return False
        with subprocess.Popen([sys.executable, "-m", "taichi_serve.cli", *words]) as process:
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                status = process.wait(STOP_SECONDS)
        if status not in (0, 128 + signal.SIGINT):
            raise SystemExit(f"taichi {words[0]} ended with exit code {status}")
        return status == 0


SMALL_FLAGS = [
    *("--max-model-len", "2048", "--max-num-seqs", "64", "--enforce-eager", "--dtype", "float32"),
    *("--kv-cache-memory-bytes", str(64 << 20), "--disable-uvicorn-access-log"),
]


def kv() -> str:
    """KV of each instance, so that two servers with weights of 30 GB fit on a card."""
    return "20G" if any("H200" in name for name in Gpus.find().names) else "6G"


def main() -> int:
    """3 where something is left for another call."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    tiny = cached_tiny_model()
    name, config = SHAPES[args.shape]  # what is known of step times is looked for by name
    there = Path(tempfile.gettempdir()) / "taichi" / name  # the same for every call: others begin anew
    made = args.model or (tiny if args.rehearse else shape(tiny, config, there))
    field, left = Field(args, Path(made)), False
    stages = {"tune": field.tune, "search": field.search, "pairs": field.pairs}
    try:
        for stage in args.stages or STAGES:
            for name in args.workloads.split(","):
                left = not stages[stage](name) or left
    finally:
        keep_logs(args.out)
        found = table(args.out)
        (args.out / "table.md").write_text(found, encoding="utf-8")
        print("something is left for another call" if left else "nothing is left", flush=True)
        print(found, flush=True)
    return LEFT if left else 0


def known_stage(word: str) -> str:
    """One of them: `choices` would refuse that none is said."""
    if word not in STAGES:
        raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(STAGES)}")
    return word


def parsed() -> argparse.Namespace:
    """The options."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu.sh versus", description=__doc__, formatter_class=shown)
    add = parser.add_argument
    add("out", type=Path)
    add("stages", nargs="*", type=known_stage, metavar="STAGE")
    add("--gpus", type=int, default=2, help="of one kind; every contender has all of them (default: 2)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="of each instance (default: 1)")
    add("--share", type=int, metavar="N", help="so many instances on one card, under MPS, instead of --gpus")
    add("--shape", choices=SHAPES, default="14b", help="random weights in this shape (default: 14b)")
    add("--model", help="a real one instead")
    add("--kv", help="of each instance (default: 20G on H200, 6G elsewhere)")
    add("--front-ends", type=int, metavar="N", help="of each server: --api-server-count (default: its own)")
    add("--memory", default="0.3", help="--gpu-memory-utilization of each instance (default: 0.3)")
    add("--workloads", default=",".join(LOADS), help=f"some of {','.join(LOADS)} (default: all)")
    add("--contenders", help=f"some of {','.join((SMALL_SPLIT, *OURS))} (default: all)")
    add(
        "--together",
        metavar="LIST",
        help="these in one comparison, all up where they fit, the first one "
        "judges: stock:256,stock:384,hybrid,auto; nothing is tuned then",
    )
    add("--start", type=float, metavar="RATE", help="the first rate (default: of the workload)")
    add("--step", type=float, default=2.0, help="from it to the next one (default: 2)")
    add("--ttft-slo", type=float, metavar="S", help="of all workloads (default: of each)")
    add("--tpot-slo", type=float, metavar="S", help="of all workloads (default: of each)")
    add("--settings", default="256,8192,192", metavar="CHUNK,S_P,S_D", help="where none are searched")
    add("--profile", help="of `taichi profile`, or a shipped one: our settings are searched from it")
    add("--requests", type=int, default=600, help="that count, of each seed and rate (default: 600)")
    add("--warm-up", type=int, default=40, help="sent before them (default: 40)")
    add("--seeds", default="0,1,2")
    add("--tolerance", type=float, default=0.05, help="of the rate (default: 0.05)")
    add("--settle", type=float, default=0.0, help="seconds of load before anything counts (default: 0)")
    add("--tuning", type=int, default=300, help="requests a rate while stock is tuned (default: 300)")
    add("--event-logs", action="store_true", help="each of ours keeps its events beside compare.json")
    add("--seconds", type=float, default=500.0, help="of this call (default: 500)")
    add("--rehearse", action="store_true", help="on a CPU, with a tiny model; give small numbers, too")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
