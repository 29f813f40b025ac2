"""What crosses between the server and the page, typed: one update, and the rows in it.

Rows of which there are many have no field names on the wire (`array_like`): page and server know their order.
Times are seconds on the server's clock; `Update.at` says what that clock shows.
"""

from __future__ import annotations

import msgspec

from taichi_serve.dashboard.attainment import Point


class Glance(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An instance. `prefill_tokens` and `output_tokens` were computed here since the server began; `back_in`
    is the seconds until it is expected to serve, None where it will not; `lost` is why it was lost last."""

    name: str
    kind: str
    chunk: int
    standing: str
    alive: bool
    silent: bool
    draining: bool
    restarts: int
    back_in: float | None
    lost: str | None
    running: int
    waiting: int
    decodes: int
    arriving: int
    queued_prefill_tokens: int
    kv_tokens: int
    kv_capacity: int
    ticks: int
    steps: int
    prefill_tokens: int
    output_tokens: int


class Live(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A live request. Output tokens are `base`, and while it decodes one more for every tick of its instance
    after `joined`. `move` says why it is under way to `target`."""

    id: str
    state: str
    instance: str | None
    target: str | None
    move: str | None
    prompt_tokens: int
    max_tokens: int
    base: int
    joined: int
    arrived_at: float
    first_at: float | None


class Hop(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A move that is complete, or (`move` is fetch) a prefix that is copied to where its prompt waits.
    `source` is None where that instance was lost; `gap` (seconds) is None for a fetch."""

    at: float
    id: str
    move: str
    source: str | None
    target: str
    kv_tokens: int
    gap: float | None


class Note(msgspec.Struct, frozen=True):
    """What happened to an instance or was done by an operator, in words. `tone` is bad, good or plain."""

    at: float
    text: str
    tone: str
    mark: bool = False  # sliders or the SLO changed: worth a mark on a time axis


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What changes slowly: promise, sliders, and how the last requests fared. `windows` have requests,
    and the shares of them that kept both SLOs, TTFT and TPOT; `history` has requests and good ones of each
    ten seconds of the last ten minutes."""

    ttft: float
    tpot: float
    p_heavy: int
    d_heavy: int
    p_chunk: int
    d_chunk: int
    max_chunk: int
    watermark: float
    autotune: str
    accepted: int
    live: int
    moves: dict[str, int]
    windows: dict[str, tuple[int, float | None, float | None, float | None]]
    history: list[tuple[int, int]]


class Update(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What changed since the update before; with `whole` everything, and what was known before is void."""

    at: float
    whole: bool = False
    standing: Standing | None = None
    instances: list[Glance] = []
    left: list[str] = []  # instances that are there no more
    requests: list[Live] = []
    gone: list[str] = []
    hops: list[Hop] = []
    points: list[Point] = []
    notes: list[Note] = []
