"""An instance without a model: vLLM's own scheduler, connector and block pool with ours on top, and a worker
that is pretended.

Every slot of KV keeps a hash of the tokens up to there. The pretended worker looks at all that attention
would read, and makes the request's true next token only where each slot holds what it should; so a block that
was never filled, was given away too early, or was found in the prefix cache too early, ends in a wrong token.
Reads take place when they end, which is the worst moment that a source can be read at.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hostbench import PretendedHost
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from taichi_serve.cluster.vllm.args import engine_config
from taichi_serve.cluster.vllm.core.marks import marks_of
from taichi_serve.cluster.vllm.core.scheduler import FlowScheduler
from taichi_serve.cluster.vllm.server.facts import hashes
from taichi_serve.cluster.vllm.wire import KEY, Again, Caching, Given, Marks, Return, direct_marker
from taichi_serve.tiny import cached_tiny_model

BLOCK = 16
CHUNK_BYTES = 4096  # of one block on the host: 2,048 bytes, in whole pages
WRONG = 1  # the token that comes out where attention read something else; no true stream has it
PRIME = (1 << 61) - 1


class Stream:
    """The one true output of a prompt: every token hangs on all before it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens, self.hashes, self._hash = list(prompt), [], 0

    def upto(self, count: int) -> None:
        """Have hashes of so many tokens, and the token after them."""
        for place in range(len(self.hashes), count):
            if place == len(self.tokens):
                self.tokens.append(self._hash % 5000 + 10)
            self._hash = (self._hash * 1000003 + self.tokens[place] + 1) % PRIME
            self.hashes.append(self._hash)
        if count == len(self.tokens):
            self.tokens.append(self._hash % 5000 + 10)


@cache
def _directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="flowbench-"))


@cache
def _config(index: int, overlap: bool, tiered: bool) -> Any:
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(18900 + index)
    init_none_hash(sha256)
    flags = ["--max-model-len", "4096", "--enforce-eager", "--block-size", str(BLOCK), "--d-heavy", "3"]
    flags += ["--kv-offloading-size", "1"] if tiered else []
    config = engine_config([str(cached_tiny_model()), *flags], f"e{index}", str(_directory()))
    logging.getLogger("vllm").setLevel(logging.ERROR)  # a thousand schedulers have a thousand greetings
    config.scheduler_config.async_scheduling = overlap  # as on a GPU; a CPU instance has none
    return config


class _NoGrammar(StructuredOutputManager):
    def __init__(self) -> None:
        pass

    def grammar_init(self, request: Any) -> None:
        pass

    def accept_tokens(self, request: Any, tokens: Any) -> bool:
        return True

    def should_advance(self, request: Any) -> bool:
        return False


def scheduler(
    index: int = 0,
    blocks: int = 64,
    chunk: int = 64,
    seats: int = 16,
    overlap: bool = True,
    v2: bool = False,
    host: int = 0,
) -> FlowScheduler:
    """The real one; with `overlap` a step is planned while the one before it runs, with `v2` for that
    model runner. `host` is how many blocks its host has room for."""
    config = _config(index, overlap, bool(host))
    if host:
        settings = config.kv_transfer_config.kv_connector_extra_config["connectors"][1]
        settings["kv_connector_extra_config"]["cpu_bytes_to_use"] = host * CHUNK_BYTES
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    kv = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    made = FlowScheduler(
        vllm_config=config,
        kv_cache_config=kv,
        structured_output_manager=_NoGrammar(),
        block_size=BLOCK,
        log_stats=True,
    )
    assert made.defer_block_free == overlap
    made.max_num_active_reqs = made.max_num_running_reqs = seats
    made.chunk = chunk
    made.use_v2_model_runner = v2
    return made


def first_hash() -> str:
    """What hashes begin with here."""
    return kv_cache_utils.NONE_HASH.hex()


def told(block_hash: bytes) -> int:
    """A hash as it is told."""
    return int.from_bytes(block_hash[:8], "little")


def reads_directly(reader: int, source: int, yes: bool) -> None:
    """Whether one instance reads the other's memory within its steps; else it goes over NIXL."""
    marker = direct_marker(_directory(), f"e{reader}", f"e{source}", 0)
    if yes:
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def request(
    name: str, tokens: Sequence[int], most: int, marks: Marks | None = None, kv: Any = None, **more: Any
) -> Request:
    """An engine request, as it comes out of the socket."""
    extra: dict[str, Any] = {} if marks is None else marks.entry()
    if kv is not None:
        extra["kv_transfer_params"] = dict(kv)
    params = SamplingParams(
        temperature=0.0, max_tokens=most, ignore_eos=True, extra_args=extra or None, **more
    )
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(
        request_id=name,
        prompt_token_ids=list(tokens),
        sampling_params=params,
        pooling_params=None,
        block_hasher=hasher,
    )


@dataclass
class Pull:
    """A read under way; it takes place when it ends. `source` is None where that one is dead."""

    leg: str
    source: Instance | None
    remote: list[int]
    local: list[int]
    note: str
    last: bool = False


@dataclass
class CopiedLeg:
    """What the pretended copier knows of a leg; see worker/legs.py."""

    given: Given | None = None
    more: tuple[int, list[int], str, bool] | None = None
    done: int = 0
    told: int = -1
    reading: Pull | None = None
    ends: list[tuple[str, str]] = field(default_factory=list)
    over: bool = False
    good: bool = False


class Copier:
    """worker/copier.py's rules without its thread: it does what `turn` says, one thing at a time."""

    def __init__(self, here: Instance) -> None:
        self.here = here
        self.legs: dict[str, CopiedLeg] = {}
        self.refused: set[str] = set()
        self.inbox: deque[Any] = (
            deque()
        )  # from the server: ("more", leg, source, blocks, note, whole), ("drop", leg)
        self.words: deque[tuple[str, str]] = (
            deque()
        )  # to the server: (copied | landed | failed | dropped, leg)
        self.returned: set[str] = set()
        self.deaf = False  # its server is gone, and it has not heard of the next one

    def order(self, order: Again | Given | Return) -> None:
        if isinstance(order, Again):
            self.deaf = False
            self.refused.clear()
            self.legs = {name: leg for name, leg in self.legs.items() if leg.reading is not None}
        elif isinstance(order, Return):
            self._end("return", order.leg)
        elif order.leg not in self.refused:
            leg = self.legs.setdefault(order.leg, CopiedLeg())
            leg.given, leg.done = order, order.first

    def turn(self) -> None:
        """Take an order, begin a read, or end one."""
        chance = self.here.chance
        if self.inbox and not self.deaf and chance.random() < 0.5:
            self._take(self.inbox.popleft())
            return
        for name, leg in list(self.legs.items()):
            if leg.reading is not None and not self.here.stuck and chance.random() < 0.5:
                self._read(name, leg, leg.reading)
            elif leg.reading is None:
                self._begin(name, leg)

    def _take(self, order: Any) -> None:
        kind, name = order[:2]
        if kind == "drop":
            self._end("drop", name)
        elif name not in self.refused:
            self.legs.setdefault(name, CopiedLeg()).more = order[2:]

    def _begin(self, name: str, leg: CopiedLeg) -> None:
        if leg.given is None or leg.more is None or leg.over or leg.ends:
            return
        source, blocks, note, whole = leg.more
        if not note and len(blocks) <= leg.done and leg.told == leg.done:
            return
        if len(blocks) > len(leg.given.blocks):
            self._over(name, leg, False)
            return
        end = len(blocks) if note else min(len(blocks), leg.done + 2)
        local, remote = leg.given.blocks[leg.done : end], blocks[leg.done : end]
        peer = self.here.peers[source]
        last = bool(note) or (whole and end == len(blocks))
        leg.reading = Pull(name, None if peer.dead else peer, remote, local, note, last)

    def _read(self, name: str, leg: CopiedLeg, pull: Pull) -> None:
        good = self.here.read(pull)
        leg.reading = None
        if not good:
            self._over(name, leg, False)
        else:
            leg.done += len(pull.local)
            if pull.last:
                self._over(name, leg, True)
                if leg.more is not None and leg.more[3]:  # no step waits for it
                    self.legs.pop(name, None)
            elif leg.more is not None and leg.done >= len(leg.more[1]):
                leg.told = leg.done
                self.words.append(("copied", name))
        for kind, _ in leg.ends:
            self._ended(kind, name)

    def _over(self, name: str, leg: CopiedLeg, good: bool) -> None:
        leg.over, leg.good = True, good
        self.words.append(("landed" if good else "failed", name))

    def _end(self, kind: str, name: str) -> None:
        leg = self.legs.get(name)
        if leg is not None and leg.reading is not None:
            leg.ends.append((kind, name))
        else:
            self._ended(kind, name)

    def _ended(self, kind: str, name: str) -> None:
        self.legs.pop(name, None)
        self.refused.add(name)
        if kind == "return":
            self.refused.discard(name)
            self.returned.add(name)
        else:
            self.words.append(("dropped" if kind == "drop" else "failed", name))

    def wait(self, name: str) -> bool:
        """A step waits; it may be in vain."""
        for _ in range(self.here.chance.choice([0, 4, 40, 40])):
            leg = self.legs.get(name)
            if name in self.refused or (leg is not None and (leg.over or leg.ends)):
                break
            self.turn()
        leg = self.legs.get(name)
        if leg is not None and leg.over:
            return self.legs.pop(name).good
        if not (name in self.refused or (leg is not None and leg.ends)):
            self._end("late", name)
        return False


class Instance:
    """One instance: the real scheduler, and a worker with two steps under way at most."""

    def __init__(
        self, index: int, chance: Random, streams: dict[str, Stream], overlap: bool = True, **shape: int
    ) -> None:
        self.index, self.chance, self.streams, self.overlap = index, chance, streams, overlap
        self.scheduler = scheduler(index, overlap=overlap, **shape)
        assert self.scheduler.cached.follow(first_hash()) == BLOCK
        self.told: list[Caching] = []
        self.believed: set[int] = set()  # to be in its cache, by all that it told
        self.peers: dict[int, Instance] = {}
        self.host = PretendedHost(self) if shape.get("host") else None
        self.believed_host: set[int] = set()
        self.dead = False
        self.stuck = False  # reads beside the steps do not end
        self.failing = 0.0  # the share of reads that fail
        self.slots: dict[int, list[int]] = {}  # block -> a hash for each slot
        self.copier = Copier(self)
        self.steps: deque[tuple[SchedulerOutput, dict[str, Any]]] = deque()
        self.worked: tuple[SchedulerOutput, ModelRunnerOutput] | None = None
        self.pulls: deque[Pull] = deque()
        self.done_sending: set[str] = set()
        self.processed: set[str] = set()
        self.held: dict[str, float] = {}
        self.early: set[str] = set()
        self.seen: dict[str, int] = {}
        self.faults: list[str] = []

    @staticmethod
    def stream_of(leg: str) -> str:
        return leg.split("#", maxsplit=1)[0]

    # ------------------------------------------------------------------------------------------ the core

    def step(self) -> list[EngineCoreOutput]:
        """What vLLM's loop does in one turn: plan a step, and take in the oldest where as many as can be are
        under way. Requests may be ended from outside while the oldest is done and not taken in."""
        if self.dead or not (self.steps or self.worked or self.scheduler.has_requests()):
            return []
        if self.worked is None and self.scheduler.has_requests() and len(self.steps) < 1 + self.overlap:
            self.plan()
            more = self.steps[-1][0].total_num_scheduled_tokens or self.scheduler.has_requests()
            if len(self.steps) < 1 + self.overlap and more and self.chance.random() < 0.8:
                return []
        if self.worked is None:
            output, sights = self.steps.popleft()
            self.worked = output, self._work(output, sights)
            if self.chance.random() < 0.3:
                return []
        return self.take_in()

    def plan(self) -> SchedulerOutput:
        """Plan a step."""
        output = self.scheduler.schedule()
        if any(leg.endswith("/loan") for leg in output.num_scheduled_tokens):
            self.faults.append("what is there to load was about to be computed")
        if loans := self.scheduler.prefixes._loans:
            self.seen["loans"] = max(self.seen.get("loans", 0), len(loans))
        sights = {leg: self._sight(leg, tokens) for leg, tokens in output.num_scheduled_tokens.items()}
        self.steps.append((output, sights))
        for leg in output.preempted_req_ids or ():
            one = self.scheduler.requests.get(leg)  # it may have been ended since
            late = one is not None and marks_of(one).best_effort
            self._count("best effort preempted" if late else "preempted")
        return output

    def take_in(self) -> list[EngineCoreOutput]:
        """The core takes in the outputs of the oldest step; the worker does it now if it has not."""
        if self.worked is None:
            output, sights = self.steps.popleft()
            self.worked = output, self._work(output, sights)
        (output, made), self.worked = self.worked, None
        found = self.scheduler.update_from_output(output, made)
        self._hear(found)
        return [one for outputs in found.values() for one in outputs.outputs]

    def _hear(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """What the record says of the cache is what the cache holds."""
        records = [one.scheduler_stats.kv_connector_stats for one in outputs.values() if one.scheduler_stats]
        record = next((stats[KEY] for stats in records if stats and KEY in stats), None)
        if record is not None and record.host is not None:
            self._hear_host(record.host)
        caching = record.cached if record is not None else None
        if caching is not None:
            self.told.append(caching)
            stored, removed = hashes(caching.stored), hashes(caching.removed)
            if (
                twice := (set(stored) & (set() if caching.reset else self.believed))
                | set(removed) - self.believed
            ):
                self.faults.append(f"told once too often: {twice}")
            if removed:
                self._count("evicted")
            self.believed = ((set() if caching.reset else self.believed) | set(stored)) - set(removed)
        if self.believed != self.cached():
            self.faults.append(f"believed and cached differ in {self.believed ^ self.cached()}")

    def _hear_host(self, caching: Caching) -> None:
        before = set() if caching.reset else self.believed_host
        stored, removed = set(hashes(caching.stored)), set(hashes(caching.removed))
        if twice := (stored & before) | (removed - before):
            self.faults.append(f"told once too often of the host: {twice}")
        self.believed_host = (before | stored) - removed
        if self.believed_host != self.on_host():
            self.faults.append(f"believed to be on the host and there: {self.believed_host ^ self.on_host()}")
        self._count("host told")

    def on_host(self) -> set[int]:
        """Hashes that a request would find on the host."""
        if self.host is None:
            return set()
        manager = self.scheduler.connector._connectors[1].scheduler.manager
        return {told(key) for key, chunk in manager._policy.chunks.items() if chunk.is_ready}

    def cached(self) -> set[int]:
        """Hashes that a request would find."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return {told(key) for key in pool.cached_block_hash_to_block._cache}

    def _sight(self, leg: str, tokens: int) -> tuple[int, int, list[int], bool]:
        """How the step sees it: tokens with KV, tokens to compute, blocks, whether more prompt follows."""
        one = self.scheduler.requests[leg]
        (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(leg)
        return one.num_computed_tokens - tokens, tokens, list(blocks), bool(one.is_prefill_chunk)

    # ---------------------------------------------------------------------------------------- the worker

    def _work(self, output: SchedulerOutput, sights: dict[str, Any]) -> ModelRunnerOutput:
        meta, on_host, words = output.kv_connector_metadata, None, None
        if self.host is not None:
            meta, on_host = meta.metadata
            self.host.before(on_host)
        invalid = self._begin(meta)
        if self.host is not None and output.has_sync_kv_loads:
            self.host.load(on_host)
        legs = list(output.num_scheduled_tokens)
        tokens = [self._compute(leg, *sights[leg]) for leg in legs]
        received: set[str] = set()
        if self.host is not None:
            if not output.has_sync_kv_loads:
                self.host.load(on_host)
            received, words = self.host.after(on_host)
        for _ in range(len(self.pulls)):
            pull = self.pulls.popleft()
            if self.stuck or self.chance.random() < 0.4:
                self.pulls.append(pull)
                continue
            if not self.read(pull):
                invalid |= set(pull.local)
            received.add(pull.leg)
        received |= self.copier.returned
        self.copier.returned = set()
        return ModelRunnerOutput(
            req_ids=legs,
            req_id_to_index={leg: i for i, leg in enumerate(legs)},
            sampled_token_ids=tokens,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(
                invalid_block_ids=invalid,
                finished_recving=received,
                finished_sending=self._sent(),
                kv_connector_worker_meta=words,
            ),
        )

    def _begin(self, meta: Any) -> set[int]:
        """Orders of the connector's metadata; the blocks that could not be read for this step."""
        invalid: set[int] = set()
        self.processed = (self.processed | set(meta.reqs_in_batch)) - set(meta.reqs_not_processed)
        now = meta.scheduler_clock
        for leg, until in meta.reqs_to_send.items():
            if leg in self.processed:
                self.held[leg] = until - now
        for leg, one in meta.reqs_to_recv.items():
            local = list(one.local_block_ids[0]) if len(one.local_block_ids) else []
            source = self.peers[int(one.remote.engine_id[1:])]
            remote = list(one.remote.block_ids[0])[-len(local) :] if local else []
            pull = Pull(leg, None if source.dead else source, remote, local, one.remote.request_id)
            if one.awaiting_kvs:
                self.pulls.append(pull)
            elif not self.read(pull):
                invalid |= set(local)
        for order in meta.taichi.copier:
            self.copier.order(order)
        for given in meta.taichi.awaited:
            if not self.copier.wait(given.leg):
                self._count("tail failed")
                invalid |= set(given.blocks[given.first :])
            else:
                self._count("tail here")
        return invalid

    def _compute(self, leg: str, at: int, tokens: int, blocks: list[int], more: bool) -> list[int]:
        stream = self.streams[self.stream_of(leg)]
        stream.upto(at + tokens)
        right = all(
            self.slots.get(block, [0] * BLOCK)[: at - first] == stream.hashes[first : min(first + BLOCK, at)]
            for block, first in zip(blocks, range(0, at, BLOCK), strict=False)
        )
        for place in range(at, at + tokens):
            slots = self.slots.setdefault(blocks[place // BLOCK], [0] * BLOCK)
            slots[place % BLOCK] = stream.hashes[place] if right else -self.chance.randrange(1, PRIME)
        return [] if more else [stream.tokens[at + tokens] if right else WRONG]

    def read(self, pull: Pull) -> bool:
        """The read takes place. False where it failed; then nobody is told, and anything may be there."""
        for block in pull.local:
            if block not in self._owned(pull.leg):
                self.faults.append(
                    f"a read for {pull.leg} wrote into block {block}, which is not its own any more"
                )
        if pull.source is not None and not pull.source.dead:
            pool = pull.source.scheduler.kv_cache_manager.block_pool
            if any(pool.blocks[block].ref_cnt == 0 for block in pull.remote):
                self.faults.append(f"a read for {pull.leg} met blocks that its source had given away")
        failed = pull.source is None or pull.source.dead or self.chance.random() < self.failing
        for mine, theirs in zip(pull.local, pull.remote, strict=True):
            there = pull.source.slots.get(theirs, [0] * BLOCK) if pull.source is not None else []
            self.slots[mine] = [-self.chance.randrange(1, PRIME)] * BLOCK if failed else list(there)
        if failed:
            self._count("read failed")
        elif pull.note and pull.source is not None:
            pull.source.early.add(pull.note)
        return not failed

    def _owned(self, leg: str) -> set[int]:
        """Its own blocks, or those that nobody gets before the steps under way are over."""
        kept = {block.block_id for _, blocks in self.scheduler.deferred_frees for block in blocks}
        if leg not in self.scheduler.requests:
            return kept
        return kept | set(self.scheduler.kv_cache_manager.get_block_ids(leg)[0])

    def _sent(self) -> set[str]:
        """Legs whose reader is done, or that are to be let go."""
        sent = {leg for leg, left in self.held.items() if left < 0 or leg in self.early}
        for leg in sent:
            del self.held[leg]
            self.early.discard(leg)
            self.processed.discard(leg)
        return sent

    def _count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    # -------------------------------------------------------------------------------------- its measures

    def used(self) -> int:
        """Blocks that somebody has."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def run(self, until: Callable[[], bool], turns: int = 200) -> list[EngineCoreOutput]:
        """Step until something holds."""
        outputs: list[EngineCoreOutput] = []
        for _ in range(turns):
            if until():
                return outputs
            outputs += self.step()
            self.copier.turn()
        raise AssertionError("it does not come to that")


def abort(instance: Instance, leg: str) -> None:
    """As vLLM's core ends a request from outside."""
    instance.scheduler.finish_requests(leg, RequestStatus.FINISHED_ABORTED)
