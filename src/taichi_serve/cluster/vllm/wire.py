"""Everything that crosses between the processes of a cluster, typed: one vocabulary, no behaviour. Users see
none of it, and may set none of it (frontend/client.py). All times are time.monotonic() seconds of whose they
are: the server makes them its own (server/offset.py).

| from   | to     | how                              | what                                        |
|--------|--------|----------------------------------|---------------------------------------------|
| server | core   | file, read once at its start     | Spec (spec.py)                              |
| server | core   | SamplingParams.extra_args[KEY]   | Marks                                       |
| server | core   | kv_transfer_params               | TransferParams                              |
| server | core   | utility calls                    | the names in Call                           |
| core   | server | the outputs of a step            | stop reasons LEFT and UNREAD, TransferParams |
| core   | server | SchedulerStats, under KEY        | Record                                      |
| core   | worker | the connector's metadata         | Given, Return, Again, in Orders             |
| server | worker | the copier's socket              | More, Drop, Gone, Ping                      |
| worker | server | the copier's socket              | Copied, Failed, Dropped, Pong               |
| worker | others | files in the server's directory  | `offer_file`, `direct_marker`               |
| core   | server | a file in its directory          | `flight_file`: who is being computed        |
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec

KEY = "taichi"  # of our entry in SamplingParams.extra_args, and in SchedulerStats.kv_connector_stats
LEFT = "taichi:left"  # stop reason of a leg that ended because the request goes on elsewhere: no user sees it
UNREAD = "taichi:unread"  # stop reason of a leg whose KV could not be read within its first step
HASH_BYTES = 8  # of each hash of a block its first are told: an unsigned little-endian number

# ------------------------------------------------------------------------------------------ server to core


class Marks(msgspec.Struct, frozen=True, omit_defaults=True):
    """Our own entry in the sampling parameters of an engine request."""

    hand_over: bool = False  # the leg ends after its first token
    reader: str | None = None  # the leg that what it computes is pinned for
    moved: bool = False  # it was already generating
    output: int = 0  # how many of its prompt tokens are output of the request
    min_tokens_done: int = 0  # of its min_tokens
    ahead: int = 0  # it is copied ahead, with room for so many tokens that are still to come
    fetch: int = 0  # blocks of its prompt, from the first one on, that are fetched before it is computed
    by: float = 0.0  # its place among the prompts that wait there, the lowest first
    best_effort: bool = False  # it can no longer meet its TTFT
    bound: bool = False  # it cannot go on elsewhere once it has a token

    def entry(self) -> dict[str, Any]:
        """As it goes into `extra_args`."""
        return {KEY: msgspec.to_builtins(self)}


NO_MARKS = Marks()


def marks(extra_args: dict[str, Any] | None) -> Marks:
    """The entry of a request; the default one where it has none."""
    ours = (extra_args or {}).get(KEY)
    return NO_MARKS if ours is None else msgspec.convert(ours, Marks)


class TransferParams(TypedDict, total=False):
    """vLLM's `kv_transfer_params` as its NIXL connector gives and takes them, with one key of ours."""

    do_remote_prefill: bool
    do_remote_decode: bool
    remote_block_ids: tuple[list[int], ...]  # by group of KV
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    tp_size: int
    remote_num_tokens: int  # ours: tokens whose KV is final at the source


class Call(StrEnum):
    """Methods that are added to vLLM's EngineCore (core/calls.py), called by server/engine_client.py. Ids
    are those of legs; one that is not there is no error."""

    ARRIVE = "taichi_arrive"  # (leg, tokens since) -> bool: copied ahead, it left; False: not to be had
    CACHED = "taichi_cached"  # (how hashes begin) -> tokens of a block, whose hashes are told; or why not
    CHUNK = "taichi_chunk"  # (tokens)
    DROP = "taichi_drop"  # (leg) -> True, once nothing is read for it here any more, however long that takes
    FETCHED = "taichi_fetched"  # (leg, blocks): so many from the first one on are here, and no more will come
    DIRECT = "taichi_direct"  # () -> ids of the engines whose memory every rank here reads itself
    HERE = "taichi_here"  # (): the core runs
    KV = "taichi_kv"  # () -> why requests of this engine stay, a sentence each; empty: they move
    LEAVE = "taichi_leave"  # (legs): they end with LEFT after the token they are on, and are held
    LET_GO = "taichi_let_go"  # (): hold nothing of what another server had under way
    PIN = "taichi_pin"  # (leg, reader) -> its full blocks, pinned; None: it does not run, or stays
    PREFIX = "taichi_prefix"  # (reader, hashes) -> blocks of its prefix cache from the first one on, pinned
    PUT_OFF = "taichi_put_off"  # (leg, by): it is best effort, and if it waits, it takes this place
    RELEASE = "taichi_release"  # (legs that left, readers of pins) -> (KV tokens held, at)
    SETTLE = "taichi_settle"  # (): it is warm
    STOPPED = "taichi_stopped"  # () -> True, once nothing is read of that any more
    WAIVE = "taichi_waive"  # (leg) -> True: nothing is fetched for it; False: it has blocks for that already


# ------------------------------------------------------------------------------------------ core to server


class MovedIn(NamedTuple):
    """What became of a request that moved in, known when it is scheduled."""

    reused: int = 0  # tokens it need not compute: pulled, or still cached here
    pulled: int = 0  # of these, from the instance before
    arrived: float = 0.0  # it came here
    began: float = 0.0  # its blocks were given and the pull was asked for
    landed: float = 0.0  # the last byte was known to be here
    before: float = 0.0  # the last step without it was scheduled
    scheduled: float = 0.0  # it went into a step


class News(NamedTuple):
    """What a followed prefill has computed so far: its full blocks, pinned for this reader."""

    reader: str
    blocks: list[int]


class Caching(NamedTuple):
    """Hashes that the prefix cache stored and removed since the last record; `reset`: no others are there."""

    stored: bytes
    removed: bytes = b""
    reset: bool = False


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One step of an engine. `moved_in` and `news` are by the ids of legs."""

    made: float  # when it was done
    seconds: float  # from the end of the step before, or from when there was work
    prefill_tokens: int
    decodes: int
    kv_tokens: int  # blocks in use times block size
    moved_in: dict[str, MovedIn] = {}
    news: dict[str, News] = {}
    cached: Caching | None = None
    host: Caching | None = None  # the same of what is offloaded to the host


# --------------------------------------------------------------------------------------- core and its workers


@dataclass(frozen=True, slots=True)
class Given:
    """The blocks of a leg here; those before `first` hold its KV already (prefix cache)."""

    leg: str
    blocks: list[int]
    first: int


@dataclass(frozen=True, slots=True)
class Return:
    """The scheduler here wants the leg's blocks back."""

    leg: str


@dataclass(frozen=True, slots=True)
class Again:
    """The server is another one, and listens where the file of keys says."""


@dataclass(slots=True)
class Orders:
    """With a step's metadata: orders for the copier, and legs whose last block it needs when it begins."""

    copier: list[Again | Given | Return] = field(default_factory=list)
    awaited: list[Given] = field(default_factory=list)


# -------------------------------------------------------------------------------------- server and copiers


class More(msgspec.Struct, frozen=True, tag=True):
    """These blocks of the source are final: all from the first one on. With `note` they are all there will
    be, and the source is told `note` when they are here. With `whole` they are all, too, but no step waits
    for them and the source is told nothing."""

    leg: str
    source: str  # engine id
    blocks: list[int]
    note: str = ""
    whole: bool = False


class Drop(msgspec.Struct, frozen=True, tag=True):
    """The leg is not wanted any more: nothing is read or written for it once Dropped is the answer."""

    leg: str


class Gone(msgspec.Struct, frozen=True, tag=True):
    """This engine (by its id) is lost: let go of its memory."""

    source: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answer with the same number: whether this process runs."""

    number: int


class Pong(msgspec.Struct, frozen=True, tag=True):
    """It does."""

    number: int


class Copied(msgspec.Struct, frozen=True, tag=True):
    """So many blocks from the first one on are here, all if `last`; `copied` were copied in `seconds`."""

    leg: str
    blocks: int
    last: bool
    copied: int
    seconds: float
    began: float
    ended: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The leg's KV cannot be had this way."""

    leg: str
    why: str


class Dropped(msgspec.Struct, frozen=True, tag=True):
    """Nothing is read or written for the leg any more."""

    leg: str


Order = More | Drop | Gone | Ping
Word = Copied | Failed | Dropped
Said = Word | Pong


def copier_endpoint(directory: Path, engine_id: str, rank: int) -> str:
    """Where the copier of one worker is spoken to: a file in the server's directory."""
    return f"ipc://{directory}/{engine_id}-{rank}.copy"


# ------------------------------------------------------------------------------------- files among workers


def offer_file(directory: Path, agent: str) -> Path:
    """Where the worker with this NIXL agent says how its memory is reached."""
    return directory / f"kv-{agent}.json"


def direct_marker(directory: Path, reader: str, source: str, rank: int) -> Path:
    """The sign that this rank of the engine `reader` reads the memory of the engine `source` itself."""
    return directory / f"direct-{reader}--{source}--{rank}"


def direct(directory: Path, reader: str, source: str, ranks: int = 1) -> bool:
    """Whether every rank of the engine `reader` reads the memory of `source` itself."""
    return all(direct_marker(directory, reader, source, rank).exists() for rank in range(ranks))


# --------------------------------------------------------------------- the flight recorder of an engine core

FLIGHT_BYTES = 1 << 16
# Byte 0 says which half counts: 0 or 1. A half is the length of its text, then the ids, apart by NUL.
FLIGHT_HALF = (FLIGHT_BYTES - 8) // 2
FLIGHT_LENGTH = struct.Struct("<I")


def flight_file(directory: Path, engine_id: str) -> Path:
    """Where an engine core writes whose prompts it is about to compute, before it does (core/flight.py)."""
    return directory / f"{engine_id}.flight"


def flight_half(half: int) -> int:
    """Where a half begins."""
    return 8 + half * FLIGHT_HALF


def read_flight(path: Path) -> list[str]:
    """Leg ids of the prompts in the steps under way when the core wrote last; none where it wrote nothing."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    if len(data) != FLIGHT_BYTES or data[0] > 1:
        return []
    start = flight_half(data[0])
    (length,) = FLIGHT_LENGTH.unpack_from(data, start)
    text = data[start + FLIGHT_LENGTH.size : start + FLIGHT_LENGTH.size + min(length, FLIGHT_HALF)]
    return [name.decode(errors="replace") for name in text.split(b"\0") if name]
