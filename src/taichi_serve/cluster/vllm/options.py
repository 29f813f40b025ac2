"""The flags of `taichi serve` that `vllm serve` does not have."""

from __future__ import annotations

from vllm.utils.argparse_utils import FlexibleArgumentParser

from taichi_serve.cluster.vllm.unsaid import DEFAULTS
from taichi_serve.latency.shipped import measured_names
from taichi_serve.scheduling.policy import FETCH, OVERLOAD, PREFIXES
from taichi_serve.sliders import MODES

TITLE = "TaiChi"
CHOSEN = "; chosen where no slider is given"

# Our flags with one value each: name, type, default (of some in unsaid.py), meaning.
FLAGS: tuple[tuple[str, type[int] | type[float] | type[str], int | float | None, str], ...] = (
    ("p-heavy", int, None, "number of P-heavy instances (large chunk: fast prefill, slow decode)"),
    ("d-heavy", int, None, "number of D-heavy instances (small chunk: slow prefill, fast decode)"),
    ("p-chunk", int, None, "prompt tokens a P-heavy instance takes into one step, beside its decodes"),
    ("d-chunk", int, None, "prompt tokens a D-heavy instance takes into one step; 0: no prefill there"),
    ("ttft-slo", float, None, "seconds to the first token that a good request may take"),
    ("tpot-slo", float, None, "seconds per output token after the first that a good request may take"),
    ("ttft-margin", float, 0.5, "an instance is feasible up to this share of the TTFT SLO, as predicted"),
    (
        "tpot-margin",
        float,
        0.8,
        "prompts avoid a D-heavy instance above this share of the TPOT SLO, as predicted",
    ),
    ("watermark", float, 0.95, "share of a D-heavy instance's KV memory above which requests are degraded"),
    ("alpha", float, 0.96, "share of the TPOT SLO at which a degraded request flows back"),
    (
        "move-timeout",
        float,
        10.0,
        "seconds a move may wait for KV before it is given up, or the KV recomputed",
    ),
    (
        "stall-timeout",
        float,
        120.0,
        "seconds an instance may be silent before it counts as lost; after 6 it gets no more work",
    ),
    (
        "restarts",
        int,
        10,
        "how often in an hour a lost instance is started again before it stays out; 0: never",
    ),
    (
        "slo-classes",
        str,
        None,
        "classes of requests with SLOs of their own: a YAML or JSON file, or a JSON object",
    ),
    (
        "cluster-host",
        str,
        None,
        "IPv4 address of this host that engines are spoken to at: over TCP, encrypted, instead of over files",
    ),
    ("ray-address", str, None, "address of the cluster of Ray to join with --ray; its own host's otherwise"),
    (
        "keep-engines",
        float,
        120.0,
        "seconds that engines wait for the next server with the same command line, with --ray; 0: they end",
    ),
    ("event-log", str, None, "file that gets every event and decision as a line of JSON"),
    (
        "profile",
        str,
        None,
        "what predictions start from instead of learning: a file of `taichi profile`, or a shipped one of "
        "these: " + (", ".join(measured_names()) or "none yet"),
    ),
)
# And those that are said or not.
SWITCHES = (
    ("ray", "run the instances on the nodes of a cluster of Ray, each in an actor of its own"),
    ("slo-response-headers", "say in each answer's headers by which SLO, and as which class, it is judged"),
    (
        "fair-classes",
        "weights of classes are their shares of what is computed in time under overload (docs/overload.md)",
    ),
    ("metrics-without-key", "let /metrics be read without the key of --api-key, for scrapers that have none"),
)
LATE = (
    "what becomes of a request that can no longer meet its TTFT: it is served in its turn, it or the longest "
    "before it is best effort, or it is turned away with a 503"
)
UNSAID = "demote where an SLO or classes are named, else serve"


def usual(words: str) -> str:
    """What follows where a flag is not given. vLLM's formatter adds the value itself to every text that does
    not ask for it: this one asks for none of its characters."""
    return f" (default: {words})%(default).0s"


def add_options(serve: FlexibleArgumentParser) -> None:
    """Give vLLM's parser of `serve` a group of our own."""
    group = serve.add_argument_group(TITLE, "Sliders, SLOs and policy of TaiChi")
    # vLLM has a --watermark too (a share of blocks to keep free, for another purpose): ours replaces it.
    group.conflict_handler = "resolve"
    for name, kind, default, text in FLAGS:
        dest = "degrade_watermark" if name == "watermark" else name.replace("-", "_")
        said = text + usual(f"{DEFAULTS[dest]}{CHOSEN}") if dest in DEFAULTS else text
        group.add_argument(f"--{name}", dest=dest, type=kind, default=default, help=said)
    group.add_argument(
        "--kv-over",
        choices=("auto", "nixl"),
        default="auto",
        help="how KV moves between instances: directly where they share a host and it lets them, or always "
        "over NIXL",
    )
    group.add_argument(
        "--prefixes",
        choices=PREFIXES,
        default=FETCH,
        help="what the scheduler does about prefix caches: it is not told of them, reckons with them, or has "
        "prefixes fetched from one instance to another, too",
    )
    group.add_argument("--overload", choices=OVERLOAD, default=None, help=LATE + usual(UNSAID))
    group.add_argument(
        "--autotune",
        choices=MODES,
        default=None,
        help="move sliders and margins by what is seen, or suggest it" + usual("off; on without a slider"),
    )
    for name, text in SWITCHES:
        group.add_argument(f"--{name}", action="store_true", help=text)
    group.add_argument(
        "--devices",
        help='devices of each instance, groups split by ";", as in "0,1;2,3"'
        + usual("consecutive GPUs, tensor-parallel size each; on CPU the cores are divided evenly"),
    )
