"""One instance as the scheduler knows it: its kind and chunk, what is queued and resident, what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from taichi_serve.sliders import Kind

UNBOUNDED = 1 << 30  # seats, where nobody said how many there are


@dataclass(slots=True, eq=False)
class Instance:
    """The scheduler's ledger of an instance. Only GlobalScheduler writes it; policies read it.

    `kv_capacity` and `kv_tokens` are in tokens. `reserved_tokens` is room promised to requests that are on
    their way here, so that two decisions made between two steps cannot take the same room.
    """

    name: str
    kind: Kind
    chunk: int
    kv_capacity: int
    seats: int = UNBOUNDED  # requests that may run at once (--max-num-seqs)
    alive: bool = True
    silent: bool = False  # does not answer: it may be slow, or lost
    draining: bool = False
    ticks: int = 0  # steps done: the clock that resident decodes are counted by
    stepped_at: float = 0.0  # when the step that runs began (s)
    missed: tuple[
        str, ...
    ] = ()  # requests that decode here and were not in its last step: they were preempted
    decodes: int = 0  # resident decodes
    arriving: int = 0  # requests on their way here to decode
    queued_tokens: int = 0  # prompt tokens to be computed of those placed here and not yet through
    progress_tokens: int = 0  # of these, computed already
    running_tokens: int = 0  # of these not yet computed, how many are in the step that runs now
    queued_requests: int = 0
    queued_attention: int = 0  # (token, attended token) pairs to be computed of the queued prompts
    queued_unused: int = 0  # cached tokens of queued prompts, in blocks that are not in use until these begin
    context_base: int = 0  # of the resident decodes: sum of prompt + base - joined
    kv_tokens: int = 0  # blocks in use times block size, as of its last step
    reserved_tokens: int = 0
    leaving_tokens: int = 0  # KV of requests that were told to go elsewhere and are not there yet
    lends_until: float = 0.0  # when all that is fetched from its prefix cache is expected to be copied (s)
    host: str = ""  # where it runs; "" where hosts are not told apart
    closing: bool = False  # takes no new prompts, and gets chunk 0 once the queued ones are through

    @property
    def answers(self) -> bool:
        """Whether it lives and was heard of."""
        return self.alive and not self.silent

    @property
    def serving(self) -> bool:
        """Whether new work may be sent here."""
        return self.alive and not self.draining and not self.silent

    @property
    def prefills(self) -> bool:
        """Whether prompts may be sent here."""
        return self.alive and self.chunk > 0 and not self.closing and not self.silent

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens that a new request would have to wait for here."""
        return self.queued_tokens - self.progress_tokens  # the ledger keeps progress within the queue

    @property
    def seats_left(self) -> int:
        """Seats for newcomers, once all who decode, are on their way, or are queued where they will decode
        have theirs. Prompts that will decode elsewhere have one for a step or two, and are not counted."""
        left = self.seats - self.decodes - self.arriving
        return left - self.queued_requests if self.kind is Kind.D_HEAVY else left

    @property
    def context_tokens(self) -> int:
        """Tokens that the resident decodes attend to, by the tick clock."""
        return self.context_base + self.decodes * self.ticks

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self.kv_tokens / self.kv_capacity if self.kv_capacity else 0.0

    @property
    def room_tokens(self) -> int:
        """Tokens of KV that can still be promised to somebody."""
        return self.kv_capacity - self.kv_tokens - self.reserved_tokens
