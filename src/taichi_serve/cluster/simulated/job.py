"""One request as the simulated cluster knows it: what it wants, where it is, and what it holds there.

This is the truth, with the length of the output in it; the scheduler has a ledger of its own and is told
facts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from taichi_serve.slo import SLO
from taichi_serve.stage import Stage, step

if TYPE_CHECKING:
    from taichi_serve.cluster.simulated.engine import Engine


@dataclass(frozen=True, slots=True)
class Call:
    """A request that will arrive: `at` in seconds, its lengths in tokens. `request` may name it. One that is
    not `movable` can only be computed again elsewhere while it has no token.

    `blocks` are the hashes of the full blocks of prompt and output together, each standing for all before it
    too; empty where nothing is shared. `then` is the next turn of the same conversation: its `at` counts from
    the end of this one (the user's think time). `slo` is its own, where that is not the server's, and
    `slo_class` its class."""

    at: float
    prompt_tokens: int
    output_tokens: int
    request: str = ""
    movable: bool = True
    blocks: tuple[int, ...] = ()
    then: Call | None = None
    slo: SLO | None = None
    slo_class: str | None = None


class Where(Enum):
    """Where a job stands in the plan of its engine, which is one step ahead of what is out (its stage)."""

    QUEUED = "queued"  # in the queue of prompts, no block taken
    COMPUTING = "computing"  # a part of its tokens is computed
    RESIDENT = "resident"  # one token a step
    ENDING = "ending"  # the last token of its leg is in a step that is not done
    INBOUND = "inbound"  # waits on the target for blocks
    PULLING = "pulling"  # has blocks on the target, its KV is on the way
    LANDED = "landed"  # its KV is here, the next step takes it


class Job:
    """A request's truth. Only its engine and the cluster write it.

    `stage` is what is known of it outside, `where` its place in the plan of `engine` (None: in no plan).
    Of a resident decode, `computed`, `made` and `run` are as they were when it joined, at tick `since`.
    """

    __slots__ = (
        "arrived_at", "began", "best_effort", "blocks", "bound", "by", "cached", "computed", "engine",
        "fetched", "filled", "finish_tick",
        "hand_over", "hashes", "id", "last", "last_at", "leg", "lender", "lent", "local", "made", "missing",
        "named", "need", "output", "pinned", "pinned_named", "prompt", "pulled", "read", "reading", "run",
        "since", "source", "stage", "target", "then", "where",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        arrived_at: float,
        prompt: int,
        output: int,
        hashes: tuple[int, ...] = (),
        then: Call | None = None,
    ) -> None:
        self.id = name
        self.arrived_at = arrived_at
        self.prompt = prompt
        self.output = output
        self.by = 0.0  # its place where it is queued, the lowest first
        self.best_effort = self.bound = False  # `bound`: with a token it cannot go on elsewhere
        self.leg, self.stage = 0, Stage.WAITING
        self.where: Where | None = None
        self.engine: Engine | None = None  # where it waits, runs or is held
        self.source: Engine | None = None  # where blocks of the leg before are pinned until it is pulled
        self.pinned = 0  # how many
        self.target: tuple[int, Engine] | None = None  # while it leaves: the leg and engine it is to go to
        self.hand_over = False
        self.pulled = False  # whether the KV of this leg came over from elsewhere
        self.missing = False  # it was decoding, was preempted, and is computed again
        self.need = prompt  # tokens to compute before the next one comes out
        self.computed = 0  # tokens whose KV is there
        self.made = 0  # output tokens so far, those in flight with them
        self.run = 0  # how many of the last of these were made here, one a tick without a gap
        self.last = 0  # the engine's tick that made the last of them
        self.began = 0  # output tokens when this leg began
        self.since = self.finish_tick = 0  # `finish_tick` makes its last token
        self.blocks = 0  # blocks on `engine`; of a resident decode, when it joined
        self.last_at = arrived_at  # when the last token of the leg before came out
        self.hashes = hashes  # of the full blocks of prompt and output
        self.then = then
        self.named: list[int] = []  # findable blocks that it uses on `engine`, of its own or shared
        self.filled = 0  # how many of its blocks were full when they were last named
        self.pinned_named: list[int] = []  # of what is pinned on `source`
        self.cached = -1  # prompt tokens that this leg did not compute; -1: nobody has looked yet
        self.fetched = 0  # of these, from the prefix cache of another instance
        self.local = 0  # tokens of a move that the target had
        self.reading = False  # waits for KV from its host or from `lender`
        self.read = 0  # how many times it did
        self.lender: Engine | None = None
        self.lent: list[int] = []  # what it pins there meanwhile

    def enter(self, stage: Stage) -> None:
        """Take a step of its journey; raises TransitionError where the table of stages does not allow it."""
        self.stage = step(self.id, self.stage, stage)

    def pin(self, source: Engine) -> None:
        """Its blocks stay on `source` while it goes elsewhere."""
        self.source, self.pinned, self.pinned_named = source, self.blocks, self.named
        self.blocks, self.named, self.filled = 0, [], 0

    def take_pinned(self) -> None:
        """It is back where they are."""
        self.blocks, self.named, self.filled = self.pinned, self.pinned_named, len(self.pinned_named)
        self.drop_pinned()

    def drop_pinned(self) -> None:
        """Nothing is pinned for it any more."""
        self.source, self.pinned, self.pinned_named = None, 0, []

    def restart(self) -> None:
        """Forget all KV: the prompt and every token so far are to be computed again."""
        self.computed = 0
        self.blocks, self.named, self.filled = 0, [], 0
        self.need = self.prompt + self.made
