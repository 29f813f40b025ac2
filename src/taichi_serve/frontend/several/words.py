"""Everything that crosses between the scheduler's process and the front ends, typed: one vocabulary, no
behaviour. All times are time.monotonic() seconds, which all processes of a host share.

| from      | to        | word                                     | what follows it            |
|-----------|-----------|------------------------------------------|----------------------------|
| server    | front end | Spec (a file, read once at its start)    |                            |
| server    | front end | Welcome, once, when all instances are up |                            |
| server    | front end | Outputs                                  | vLLM's EngineCoreOutputs   |
| server    | front end | Failed, Declined, Standing, Answer, Ping |                            |
| front end | server    | Submitted                                | vLLM's EngineCoreRequest   |
| front end | server    | Abandoned, Question, Serving, Pong, Note |                            |

What follows a word is in frames of their own, in vLLM's encoding. Nothing is pickled.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from taichi_serve.slo import SLO


class Spec(msgspec.Struct, frozen=True):
    """What one front end is started with. `listening` is the number of the socket that it inherits, on which
    all of them listen; `line`, `inside` and `shared` are paths in the server's directory."""

    argv: list[str]
    index: int
    count: int
    parent: int  # the server's process: the front end ends with it
    address: str  # in words, of the socket
    listening: int
    line: str  # where these words are spoken
    inside: str  # where the server answers what is under /taichi
    shared: str  # counters that all front ends see
    directory: str  # its name: part of the ids of engines


# ------------------------------------------------------------------------------------- server to front end


class Instance(msgspec.Struct, frozen=True, array_like=True):
    """One instance, as far as clients are told of it."""

    index: int
    alive: bool
    silent: bool


class Standing(msgspec.Struct, frozen=True, tag=True):
    """How the instances stand. `back_at` is when one is expected, while none lives and one will come back.
    `slo` is what the server promises."""

    instances: tuple[Instance, ...]
    back_at: float | None
    slo: SLO


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """What is known once the engines are up. `cache` are settings of vLLM's CacheConfig that they found out
    (CACHE). `hashes` is what hashes of first blocks are chained to, as hex;
    None where nobody asks for hashes."""

    cache: dict[str, int | float | None]
    max_model_len: int
    hashes: str | None
    standing: Standing


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """Outputs of a step of one instance, those of this front end's requests."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request ends with an error."""

    request: str
    why: str


class Declined(msgspec.Struct, frozen=True, tag=True):
    """A request is turned away; it may come back after so many seconds."""

    request: str
    retry_after: float


class Answer(msgspec.Struct, frozen=True, tag=True):
    """To the question with this number; with `wrong` there is no result."""

    number: int
    result: Any = None
    wrong: str | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Say that you run. In `drained` seconds the first instance is through with what is queued there now."""

    drained: float = 0.0


# ------------------------------------------------------------------------------------- front end to server


class Submitted(msgspec.Struct, frozen=True, tag=True):
    """A request. It belongs to the `asked`th HTTP request of this front end, which is answered with the id
    `name`. `blocks` are the hashes of the full blocks of its prompt; `slo` and `slo_class` are those of
    messages.Arrived."""

    asked: int
    name: str
    blocks: tuple[int, ...] = ()
    slo: SLO | None = None
    slo_class: str | None = None


class Abandoned(msgspec.Struct, frozen=True, tag=True):
    """Nobody wants the rest of a request: its client left (`cancelled`), or a stop string was found."""

    request: str
    cancelled: bool


class Question(msgspec.Struct, frozen=True, tag=True):
    """Call this method of vLLM's engine client on every instance."""

    number: int
    method: str
    args: list[Any] = []


class Serving(msgspec.Struct, frozen=True, tag=True):
    """It accepts connections."""


class Pong(msgspec.Struct, frozen=True, tag=True):
    """It runs."""


class Note(msgspec.Struct, frozen=True, tag=True):
    """Something failed beside serving (trouble.py)."""

    what: str
    why: str


ToFrontEnd: TypeAlias = Welcome | Outputs | Failed | Declined | Standing | Answer | Ping
ToServer: TypeAlias = Submitted | Abandoned | Question | Serving | Pong | Note
Word: TypeAlias = ToFrontEnd | ToServer

# What an engine that comes up tells its client of its cache (vLLM's EngineCoreReadyResponse).
CACHE = (
    "num_gpu_blocks",
    "block_size",
    "mamba_block_size",
    "effective_attention_block_size",
    "kv_cache_size_tokens",
    "kv_cache_max_concurrency",
)
# What a front end may have called: the calls of everywhere.py.
CALLS = frozenset(
    {
        "get_supported_tasks_async",
        "reset_mm_cache_async",
        "reset_prefix_cache_async",
        "reset_encoder_cache_async",
        "profile_async",
        "add_lora_async",
        "remove_lora_async",
        "list_loras_async",
        "pin_lora_async",
        "get_weight_version_async",
        "collective_rpc_async",
    }
)
