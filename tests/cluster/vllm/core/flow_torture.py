"""Many requests that move between pretended instances in every way there is, while everything that can go
wrong does: reads fail or stand still, tails are late, legs are dropped and aborted at any time, there is no
room, requests are preempted, an instance dies. Prompts fetch what others have of them meanwhile.
Deterministic by its seed.

    python tests/cluster/vllm/core/flow_torture.py SECONDS [SEED [host]]

It runs until it finds something, or time is up.

Stands for the server in the simplest way that keeps to the protocol of docs/decisions/118: a source is told
to let go after the target's answer to a drop, or after the first token there.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random
from typing import Any

from flowbench import BLOCK, WRONG, Instance, Stream, abort, reads_directly, request
from msgspec.structs import replace
from vllm.v1.engine import EngineCoreOutput

from taichi_serve.cluster.vllm.core.forget import let_go, stop, stopped
from taichi_serve.cluster.vllm.wire import LEFT, UNREAD, Marks

ROOM = 32


@dataclass
class Move:
    """One move of a job, from `source` to `target`."""

    source: int
    target: int
    source_leg: str
    leg: str
    ahead: bool
    known: int = 0
    left: bool = False  # the source's blocks are held for it
    gone: bool = False  # the tail was asked for
    over: bool = False


@dataclass
class Fetch:
    """What the leg `leg` at `target` fetches of its prompt from `source`."""

    source: int
    target: int
    leg: str
    hashes: list[bytes]
    answer: Future[list[int]] | list[int] | None = None  # None: the source has not been asked yet
    found: int = 0
    copying: bool = False


@dataclass
class Job:
    """One request of a user."""

    name: str
    prompt: int
    most: int
    at: int = 0
    leg: str = ""
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    move: Move | None = None  # before its next leg's first token
    fetch: Fetch | None = None  # before this leg's first token
    place: Marks | None = None  # its place, whether it is best effort, and whether it is bound
    done: bool = False


def placed(job: Job, marks: Marks | None) -> Marks | None:
    """These marks, and the job's place where it has one."""
    if (place := job.place) is None:
        return marks
    return replace(marks or Marks(), by=place.by, best_effort=place.best_effort, bound=place.bound)


class World:
    """Instances, jobs, and the messages between them, which take any time."""

    def __init__(self, seed: int, host: bool = False) -> None:
        chance = self.chance = Random(seed)
        self.streams: dict[str, Stream] = {}
        count = chance.choice([2, 2, 3])
        shape = {
            "blocks": chance.choice([14, 24, 60]),
            "seats": chance.choice([2, 4, 16]),
            "chunk": chance.choice([16, 32, 64]),
            "overlap": chance.choice([True, True, False]),
            "v2": chance.choice([True, False]),
        }
        if host:
            shape["host"] = Random(seed).choice([6, 40, 40])
        self.host = host
        self.instances = [Instance(i, Random(seed * 7 + i), self.streams, **shape) for i in range(count)]
        peers = dict(enumerate(self.instances))
        failing = chance.choice([0.0, 0.05, 0.2])
        for one in self.instances:
            one.peers, one.failing = peers, failing
            for other in self.instances:
                if other is not one:
                    reads_directly(one.index, other.index, bool(chance.getrandbits(1)))
        self.jobs: dict[str, Job] = {}
        self.moves: list[Move] = []
        self.heard: list[deque[EngineCoreOutput]] = [deque() for _ in self.instances]
        self.asked: list[tuple[Move | Fetch, Future[bool] | bool]] = []
        self.shared = [chance.randint(10, 5000) for _ in range(64)]
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self.running: list[Instance] = []  # that have not heard of the next server yet
        self.stopping: list[Future[bool] | bool] = []
        self.placing = Random(seed + 1_000_000) if seed % 2 else None  # every other world has places

    # ------------------------------------------------------------------------------------ what users do

    def arrive(self) -> None:
        chance = self.chance
        name = f"r{len(self.jobs)}"
        length = chance.randint(1, 90)
        common = chance.choice([0, min(length, 64), min(chance.randint(0, length), 64)])
        prompt = self.shared[:common] + [chance.randint(10, 5000) for _ in range(length - common)]
        if self.host and self.jobs and chance.random() < 0.5:  # the next turn of a conversation
            prompt = self.streams[chance.choice(list(self.jobs))].tokens[:70] + prompt[: max(1, length // 5)]
            length = len(prompt)
        self.streams[name] = Stream(prompt)
        job = self.jobs[name] = Job(name, length, chance.randint(1, 30))
        job.at, job.leg = chance.randrange(len(self.instances)), name
        if (p := self.placing) is not None:
            job.place = Marks(by=1 + p.random(), best_effort=p.random() < 0.4, bound=p.random() < 0.3)
        if self.instances[job.at].dead:
            job.done = True
            return
        self._start(job)

    def _start(self, job: Job, again: bool = False) -> None:
        """Compute the tokens so far where it is; some are to be handed over after the first."""
        hand_over = self.chance.random() < 0.4
        others = [i for i in range(len(self.instances)) if i != job.at and not self.instances[i].dead]
        marks = None
        if job.tokens:
            marks = Marks(moved=True, output=len(job.tokens))
        elif hand_over and others:
            follow = self.chance.random() < 0.5
            move = Move(job.at, self.chance.choice(others), job.leg, self._name(job), False)
            marks = Marks(hand_over=True, reader=f"{move.leg}+" if follow else None)
            job.move = move
            self.moves.append(move)
        tokens = self.streams[job.name].tokens[: job.prompt + len(job.tokens)]
        if not job.tokens and others and not again and self.chance.random() < 0.6:
            marks = self._fetch(job, tokens, self.chance.choice(others), marks or Marks())
        self.instances[job.at].scheduler.add_request(
            request(job.leg, tokens, job.most - len(job.tokens), placed(job, marks))
        )

    # ----------------------------------------------------------------------------------------- fetches

    def _fetch(self, job: Job, tokens: list[int], source: int, marks: Marks) -> Marks:
        """Have a prompt fetch some of its blocks from another instance."""
        hashes = list(request("hashes", tokens, 1).block_hashes)[: (len(tokens) - 1) // BLOCK]
        hashes = hashes[: self.chance.randint(1, len(hashes))] if hashes else []
        if not hashes:
            return marks
        job.fetch = Fetch(source, job.at, job.leg, [bytes(one) for one in hashes])
        self.seen["to fetch"] += 1
        return replace(marks, fetch=len(hashes))

    def fetches(self) -> None:
        """Sources are asked, and answer."""
        for job in self.jobs.values():
            fetch = job.fetch
            if fetch is None or fetch.copying or self.chance.random() < 0.5:
                continue
            source = self.instances[fetch.source]
            if fetch.answer is None:
                fetch.answer = [] if source.dead else source.scheduler.prefixes.ask(fetch.leg, fetch.hashes)
            elif isinstance(fetch.answer, list):
                self._found(job, fetch, fetch.answer)
            elif fetch.answer.done() or source.dead:
                self.seen["found later"] += 1
                self._found(job, fetch, [] if source.dead else fetch.answer.result())

    def _found(self, job: Job, fetch: Fetch, blocks: list[int]) -> None:
        if not blocks:
            self._go_without(job, fetch)
            return
        fetch.copying, fetch.found = True, len(blocks)
        self.instances[fetch.target].copier.inbox.append(("more", fetch.leg, fetch.source, blocks, "", True))

    def _go_without(self, job: Job, fetch: Fetch) -> None:
        """It is late, or cannot be read, or its source is lost."""
        target = self.instances[fetch.target]
        if not fetch.copying:
            target.scheduler.fetches.fetched(fetch.leg, 0)
        elif not target.scheduler.fetches.waive(fetch.leg):
            self._give_up(fetch)
            if job.move is not None:
                self._give_up(job.move)
                job.move = None
            job.fetch, job.leg = None, self._name(job)
            self.seen["fetch begun anew"] += 1
            self._start(job, again=True)
            return
        job.fetch = None
        target.copier.inbox.append(("drop", fetch.leg))
        self._let_go(fetch)
        self.seen["went without"] += 1

    def _fetched(self, job: Job, fetch: Fetch) -> None:
        self.instances[fetch.target].scheduler.fetches.fetched(fetch.leg, fetch.found)
        job.fetch = None
        self._let_go(fetch)
        self.seen["fetched"] += 1

    def _fetch_is_over(self, job: Job) -> None:
        """Its leg makes tokens, or is ended."""
        fetch, job.fetch = job.fetch, None
        if fetch is None:
            return
        if fetch.copying:
            self.instances[fetch.target].copier.inbox.append(("drop", fetch.leg))
        self._let_go(fetch)

    def _end_fetch(self, job: Job) -> None:
        """Its leg is not wanted any more."""
        fetch, job.fetch = job.fetch, None
        if fetch is not None and fetch.copying:
            self._give_up(fetch)
        elif fetch is not None:
            self._let_go(fetch)

    def _name(self, job: Job) -> str:
        job.number += 1
        return f"{job.name}#{job.number}"

    def cancel(self, job: Job) -> None:
        if job.done:
            return
        job.done = True
        if job.move is not None:
            self._give_up(job.move)
            job.move = None
        self._end_fetch(job)
        self._abort(job.at, job.leg)

    def _abort(self, at: int, leg: str) -> None:
        if not self.instances[at].dead:
            abort(self.instances[at], leg)

    # ---------------------------------------------------------------------------------------- moves

    def begin_move(self, job: Job) -> None:
        others = [i for i in range(len(self.instances)) if i != job.at and not self.instances[i].dead]
        if job.done or job.move is not None or not job.tokens or not others:
            return
        move = Move(job.at, self.chance.choice(others), job.leg, self._name(job), self.chance.random() < 0.6)
        job.move = move
        self.moves.append(move)
        source = self.instances[move.source].scheduler
        if not move.ahead:
            source.leave([move.source_leg])
            return
        blocks = source.pin(move.source_leg, move.leg)
        if blocks is None:
            move.ahead = False
            source.leave([move.source_leg])
            return
        move.known = len(job.tokens)
        tokens = self.streams[job.name].tokens[: job.prompt + move.known]
        marks = Marks(moved=True, output=move.known, ahead=ROOM)
        target = self.instances[move.target]
        marks = placed(job, marks)
        target.scheduler.add_request(request(move.leg, tokens, job.most - move.known, marks))
        target.copier.inbox.append(("more", move.leg, move.source, blocks, "", False))
        self.seen["ahead"] += 1

    def _give_up(self, move: Move | Fetch) -> None:
        """End the leg at the target; when it answers, the source may let go."""
        if isinstance(move, Move):
            if move.over:
                return
            move.over = True
        target = self.instances[move.target]
        if target.dead:
            self._let_go(move)
            return
        if isinstance(move, Fetch) or move.ahead:
            target.copier.inbox.append(("drop", move.leg))
        self.asked.append((move, target.scheduler.drop(move.leg)))
        self.seen["dropped"] += 1

    def _let_go(self, move: Move | Fetch) -> None:
        source = self.instances[move.source]
        if isinstance(move, Fetch):
            if not source.dead:
                source.scheduler.release([], [move.leg])
        elif not source.dead:
            source.scheduler.release([move.source_leg] if move.left else [], [move.leg, f"{move.leg}+"])

    def answers(self) -> None:
        waiting = []
        for move, answer in self.asked:
            if isinstance(answer, Future) and not answer.done() and not self.instances[move.target].dead:
                waiting.append((move, answer))
            else:
                self._let_go(move)
        self.asked = waiting

    # ------------------------------------------------------------------------------- what instances say

    def hear(self, index: int) -> None:
        """The next output of an instance, and the next word of its copier."""
        if self.heard[index] and self.chance.random() < 0.9:
            self._take(index, self.heard[index].popleft())
        words = self.instances[index].copier.words
        if words:
            self._word(*words.popleft())

    def _word(self, kind: str, leg: str) -> None:
        job = self.jobs[leg.split("#", maxsplit=1)[0]]
        move, fetch = job.move, job.fetch
        if fetch is not None and fetch.leg == leg and kind in ("landed", "failed"):
            self._fetched(job, fetch) if kind == "landed" else self._go_without(job, fetch)
            return
        if move is None or move.leg != leg or move.over:
            return
        if kind == "copied" and not move.left:
            if not self.instances[move.source].dead:
                self.instances[move.source].scheduler.leave([move.source_leg])
        elif kind == "landed" and move.gone and not self._direct(move):
            self._arrive(job, move)
        elif kind == "failed" and not move.gone:
            self._give_up(move)
            job.move = None
        elif kind == "failed":
            self._again(job, move)

    def _direct(self, move: Move) -> bool:
        return self.instances[move.target].scheduler._side._is_direct(f"e{move.source}")

    def _take(self, index: int, output: EngineCoreOutput) -> None:
        leg = output.request_id
        job = self.jobs[leg.split("#", maxsplit=1)[0]]
        left = output.stop_reason == LEFT
        if job.done or job.leg != leg or job.at != index:
            if left:
                self._late(index, leg)
            return
        self._fetch_is_over(job)
        if output.new_token_ids and job.move is not None and job.move.leg == leg:
            self._landed(job, job.move)
        job.tokens += output.new_token_ids
        true = self.streams[job.name].tokens[job.prompt : job.prompt + len(job.tokens)]
        if job.tokens != true or WRONG in output.new_token_ids:
            self.wrong.append(f"{leg} on i{index}: token {len(job.tokens)} is wrong")
        if left:
            self._left(job, output)
        elif output.stop_reason == UNREAD:
            self.seen["unread"] += 1
            if job.move is None:
                self.wrong.append(f"{leg} had tokens already, and then it could not be read")
                job.done = True
                return
            self._again(job, job.move)
        elif output.finish_reason is not None:
            job.done = True
            if job.move is not None:
                self._give_up(job.move)
                job.move = None

    def _late(self, index: int, leg: str) -> None:
        """It left before it was ended from outside. Whoever was to read it is asked first."""
        for move in self.moves:
            if move.source_leg == leg and move.source == index:
                move.left = True
                self._give_up(move) if not move.over else self.asked.append((move, self._ask(move)))
                return
        self.instances[index].scheduler.release([leg])

    def _ask(self, move: Move) -> Future[bool] | bool:
        target = self.instances[move.target]
        return True if target.dead else target.scheduler.drop(move.leg)

    def _landed(self, job: Job, move: Move) -> None:
        """Its first token is there: nothing is read for it any more."""
        move.over = True
        job.move = None
        self._let_go(move)
        self.seen["moved"] += 1

    def _left(self, job: Job, output: EngineCoreOutput) -> None:
        params: Any = output.kv_transfer_params
        move = job.move
        if move is None:  # it was given up after the source was told
            self.instances[job.at].scheduler.release([job.leg])
            job.leg = self._name(job)
            self._start(job)
            return
        move.left = True
        target = self.instances[move.target]
        if target.dead:
            self._again(job, move)
            return
        job.at, job.leg = move.target, move.leg
        blocks = list(params["remote_block_ids"][0])
        if move.ahead and params["remote_num_tokens"] < job.prompt + move.known + ROOM:
            move.gone = True
            if self._direct(move):
                self._arrive(job, move)
            target.copier.inbox.append(("more", move.leg, move.source, blocks, move.source_leg, False))
            return
        if move.ahead:
            self._again(job, move)
            return
        marks = Marks(moved=True, output=len(job.tokens))
        tokens = self.streams[job.name].tokens[: job.prompt + len(job.tokens)]
        marks = placed(job, marks)
        target.scheduler.add_request(request(move.leg, tokens, job.most - len(job.tokens), marks, params))

    def _arrive(self, job: Job, move: Move) -> None:
        if job.leg == move.leg and not self.instances[move.target].scheduler.arrive(
            move.leg, job.tokens[move.known :]
        ):
            self._again(job, move)

    def _again(self, job: Job, move: Move) -> None:
        """Its KV does not come: compute its tokens again, under another name."""
        self._give_up(move)
        job.move = None
        job.at = move.target if not self.instances[move.target].dead else move.source
        if self.instances[job.at].dead:
            alive = [one.index for one in self.instances if not one.dead]
            job.at = alive[0]
        job.leg = self._name(job)
        self._start(job)

    def lose(self, index: int) -> None:
        """An instance dies. Whoever runs there goes on elsewhere from the tokens so far."""
        alive = [one for one in self.instances if not one.dead and one.index != index]
        if self.instances[index].dead or not alive:
            return
        dead = self.instances[index]
        dead.dead = True
        self.heard[index].clear()
        dead.copier.words.clear()
        self.seen["lost"] += 1
        for job in self.jobs.values():
            if job.done:
                continue
            if job.fetch is not None and index in (job.fetch.source, job.fetch.target):
                if job.fetch.target == index:
                    self._end_fetch(job)
                else:
                    self._go_without(job, job.fetch)
            move = job.move
            if move is not None and index in (move.source, move.target) and not move.over:
                self._give_up(move)
                job.move = None
                if job.at == index or job.leg == move.leg:
                    self._abort(job.at, job.leg)
                else:
                    continue
            elif job.at != index:
                continue
            job.at, job.leg = self.chance.choice(alive).index, self._name(job)
            self._start(job)

    def another_server(self) -> None:
        """This one is killed; the next one takes the engines, and knows of nothing."""
        for job in self.jobs.values():
            job.done, job.move, job.fetch = True, None, None
        self.asked, self.moves = [], []
        self.running = [one for one in self.instances if not one.dead]
        for one in self.instances:
            one.copier.inbox.clear()
            one.copier.deaf = True

    def take_over(self) -> None:
        """Engines hear of it one after the other; when all have stopped each lets go."""
        if self.running and self.chance.random() < 0.1:
            one = self.running.pop()
            self.heard[one.index].clear()
            one.copier.words.clear()
            self.seen["forgotten"] += len(one.scheduler.requests)
            self.seen["forgotten while read"] += len(one.scheduler._reads)
            stop(one.scheduler)
            self.stopping.append(stopped(one.scheduler))
        if self.running or not self.stopping:
            return
        if all(answer is True or (isinstance(answer, Future) and answer.done()) for answer in self.stopping):
            self.stopping = []
            for one in self.instances:
                if not one.dead:
                    let_go(one.scheduler)

    # ----------------------------------------------------------------------------------------- the end

    def turn(self, settle: bool) -> None:
        """One thing happens somewhere."""
        chance, index = self.chance, self.chance.randrange(len(self.instances))
        one = self.instances[index]
        if chance.random() < 0.02 and not settle:
            one.stuck = not one.stuck
        one.stuck = one.stuck and not settle
        if not one.dead:
            self.hear(index)
            one.copier.turn()
            if len(self.heard[index]) < 3:
                self.heard[index].extend(one.step())
        self.answers()
        self.fetches()
        self.take_over()
        if not self.jobs:
            return
        if settle and self.host and chance.random() < 0.01:  # full of what waits for room elsewhere
            self._patience_ends(chance.choice(list(self.jobs.values())))
        if not settle and not self.running and not self.stopping:
            self._something_else(chance.choice(list(self.jobs.values())), index)

    def _something_else(self, job: Job, index: int) -> None:
        one, what = self.instances[index], self.chance.random()
        if what < 0.12:
            self.begin_move(job)
        elif what < 0.13:
            self.cancel(job)
        elif what < 0.16:
            self._patience_ends(job)
        elif what < 0.1604:
            self.lose(index)
        elif what < 0.17 and not one.dead and self._reset(one):
            self.seen["reset"] += 1

    def _reset(self, one: Instance) -> bool:
        """Forget the prefix cache, and sometimes what is on the host."""
        both = self.host and self.chance.random() < 0.3
        done = bool(one.scheduler.reset_prefix_cache(reset_connector=both))
        if done and both:
            self.seen["host reset"] += 1
        return done

    def _patience_ends(self, job: Job) -> None:
        move = job.move
        if job.fetch is not None:
            self._go_without(job, job.fetch)
            return
        if move is None or job.done:
            return
        if job.leg == move.leg:
            self._again(job, move)
        elif move.ahead and not move.left:
            self._give_up(move)
            job.move = None

    def faults(self) -> list[str]:
        """What must never be, when all is over."""
        found = list(self.wrong)
        found += [f"{job.name} waits for ever: {job}" for job in self.jobs.values() if not job.done]
        for one in self.instances:
            found += one.faults
            if one.dead:
                continue
            if one.used() or one.scheduler.requests:
                names = {n: r.status.name for n, r in one.scheduler.requests.items()}
                found.append(f"i{one.index} still has {one.used()} blocks, {names}, {one.held}")
            if one.believed != one.cached():
                found.append(f"i{one.index} is idle and has not told what its cache holds")
            if one.believed_host != one.on_host():
                found.append(f"i{one.index} is idle and has not told what its host holds")
            books = {"reads": len(one.scheduler._reads), "pins": len(one.scheduler._pins._blocks)}
            books |= {"arrivals": len(one.scheduler._arrivals), "pulled": len(one.scheduler._side.pulled)}
            books |= {"loans": len(one.scheduler.prefixes._loans or ())}
            books |= {"asked": len(one.scheduler.prefixes._asked), "to fetch": len(one.scheduler.fetches)}
            books |= {"leaving": len(one.scheduler._leaving), "known": len(one.scheduler._side._known)}
            books |= {
                "arrived": len(one.scheduler._side._arrived),
                "followed": len(one.scheduler._pins._followed),
            }
            if any(books.values()):
                found.append(f"i{one.index} remembers {books}")
        return found


def torture(
    seed: int, jobs: int = 12, turns: int = 500, host: bool = False, killed: int | None = None
) -> tuple[list[str], Counter[str]]:
    """One run: the faults that it found, and what took place. With `host` KV is offloaded, too. In the turn
    `killed` the server is, and another one goes on with as many jobs more."""
    world = World(seed, host)
    for number in range(turns):
        if number == killed:
            world.another_server()
            jobs += len(world.jobs)
        taken = not world.running and not world.stopping
        if taken and len(world.jobs) < jobs and world.chance.random() < 0.05:
            world.arrive()
        world.turn(settle=False)
    for _ in range(6000):
        world.turn(settle=True)
        if all(job.done for job in world.jobs.values()) and not any(
            one.used() or one.steps or one.worked or one.scheduler.requests
            for one in world.instances
            if not one.dead
        ):
            break
    for _ in range(60):
        world.turn(settle=True)
    for one in world.instances:
        world.seen.update(one.seen)
    return world.faults(), world.seen


def main(seconds: float, seed: int, host: bool) -> int:
    """Run until something is found."""
    ends, runs, seen = time.monotonic() + seconds, 0, Counter[str]()
    while time.monotonic() < ends:
        found, counts = torture(seed + runs, host=host)
        runs, seen = runs + 1, seen + counts
        if found:
            print(f"seed {seed + runs - 1} (run {runs}):", *found[:8], sep="\n  ")
            return 1
    print(f"{runs} runs, nothing found: {dict(seen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, "host" in sys.argv))
