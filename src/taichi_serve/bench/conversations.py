"""Conversations: the traffic of chats and agents, where the next prompt is the last one with its answer and a
little more, and many have the same system prompt. Beside them come prompts that share nothing.

A conversation begins with a system prompt, one of a few, by Zipf's law. Every turn adds a message, or the
result of a tool that the turn before has called, and is answered. The number of turns is geometric. The next
turn comes when the answer is complete and its user has thought, or the tool has run. A turn that no longer
fits into the model starts over behind the system prompt, as clients do that drop what is too old.

Conversation number k of a seed is the same at every rate, turn by turn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, repeat

from taichi_serve.bench.arrivals import Arrivals, stream
from taichi_serve.bench.births import Births, within
from taichi_serve.bench.blocks import chained, unshared
from taichi_serve.bench.lengths import BLOCK, LogNormal
from taichi_serve.cluster.simulated.job import Call


@dataclass(frozen=True, slots=True)
class Conversations:
    """What is drawn; lengths in tokens, times in seconds.

    `share` is the share of prompt tokens that an earlier prompt or answer had, over all requests of a long
    run. Conversations alone have `most_share`; what they have above `share` is made up by requests that share
    nothing, whose prompts are as long on average.
    """

    share: float = 0.8
    turns: float = 5.0  # of a conversation, mean of a geometric number
    think: float = 20.0  # from an answer to the next message, mean (exponential)
    tools: float = 0.3  # share of all turns but the last that call a tool
    wait: float = 1.0  # from a call to the tool's result, mean (exponential)
    systems: int = 16  # system prompts
    zipf: float = 1.0  # the n-th of these is 1/n^zipf as frequent as the first
    system: LogNormal = LogNormal(800, 0.4, 8_000)
    message: LogNormal = LogNormal(120, 1.0, 8_000)
    answer: LogNormal = LogNormal(250, 0.8, 2_048)
    call: LogNormal = LogNormal(40, 0.5, 512)  # an answer that calls a tool
    result: LogNormal = LogNormal(300, 1.0, 8_000)  # of a tool
    limit: int = 32_768  # of prompt and output together
    spread: float = 1.0  # sigma of the prompts that share nothing

    def __post_init__(self) -> None:
        for name, least, most in LIMITS:
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least:g} to {most:g}, not {value!r}")
        if self.share > self.most_share:
            raise ValueError(
                f"share={self.share:g} is more than the {self.most_share:.3f} that such conversations have: "
                "more turns, longer system prompts and answers, or shorter messages share more"
            )

    def scaled(self, factor: float) -> Conversations:
        """All lengths so many times as long."""
        return replace(self, **{name: getattr(self, name).scaled(factor) for name in LENGTHS})

    def fitted(self, limit: int) -> Conversations:
        """For a model that takes `limit` tokens: a first turn always fits."""
        part = max(1, limit // 4)
        fitting = {name: getattr(self, name).within(part) for name in LENGTHS}
        return replace(self, limit=limit, **fitting)

    @property
    def prompt(self) -> float:
        """Mean prompt of a conversation's turns (tokens), if none starts over."""
        grown = self.later + self.tools * self.call.mean + (1 - self.tools) * self.answer.mean
        return self.system.mean + self.message.mean + (self.turns - 1) * grown

    @property
    def later(self) -> float:
        """Mean message of a turn that is not the first (tokens)."""
        return self.tools * self.result.mean + (1 - self.tools) * self.message.mean

    @property
    def most_share(self) -> float:
        """Share of the prompt tokens of conversations that are not new, with half a block lost each time."""
        new = (self.message.mean + (self.turns - 1) * self.later) / self.turns + BLOCK / 2
        return max(0.0, 1 - new / self.prompt)

    @property
    def alone(self) -> float:
        """Share of all requests that share nothing."""
        return 1 - self.share / self.most_share if self.most_share else 1.0

    @property
    def between(self) -> float:
        """Mean seconds from an answer to the next turn."""
        return (1 - self.tools) * self.think + self.tools * self.wait


LENGTHS = ("system", "message", "answer", "call", "result")
LIMITS = (
    ("share", 0.0, 1.0),
    ("turns", 1.0, 1000.0),
    ("think", 0.0, 1e6),
    ("tools", 0.0, 1.0),
    ("wait", 0.0, 1e6),
    ("systems", 1, 100_000),
    ("zipf", 0.0, 10.0),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens of the prompt and of the answer, and the seconds between the answer before and this turn; `over`
    where it starts over behind the system prompt."""

    prompt: int
    answer: int
    after: float
    over: bool = False


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation: which system prompt it has, how long that is (tokens), and all its turns."""

    system: int
    length: int
    turns: tuple[Turn, ...]
    pauses: tuple[float, ...]  # seconds before each turn, from the answer before


@dataclass(frozen=True, slots=True)
class Talks:
    """Conversations, and what comes beside them, as a source of calls."""

    what: Conversations

    @property
    def block_size(self) -> int:
        """As engines have it."""
        return BLOCK

    def calls(self, arrivals: Arrivals, rate: float, requests: int, seed: int) -> Iterator[Call]:
        """`rate` is that of all requests, turns with those that share nothing, from the first second on
        (births.py), as far as answers take no time; there are exactly `requests` of them."""
        what = self.what
        talks = Memory(what, seed)
        plan = within(
            requests,
            Births(rate * (1 - what.alone), what.turns, what.between).times(arrivals, stream("talks", seed)),
            Births(rate * what.alone).times(arrivals, stream("alone", seed)),
            lambda number: talks.talk(number).pauses,
        )
        for born in plan:
            if born.turns:
                yield talks.calls(born.number, born.at, born.turns)
            else:
                yield talks.single(born.number, born.at)


class Memory:
    """All that a seed stands for; a conversation is drawn when it is asked for."""

    def __init__(self, what: Conversations, seed: int) -> None:
        self.what, self.seed = what, seed
        self.weights = list(accumulate((n + 1) ** -what.zipf for n in range(what.systems)))
        self.talk = cache(self._talk)
        self.system = cache(self._system)

    def _chance(self, name: str, number: int) -> random.Random:
        return stream(f"{name} {number}", self.seed)

    def _system(self, number: int) -> tuple[int, tuple[int, ...]]:
        """Length (tokens) and full blocks of a system prompt."""
        chance = self._chance("system prompt", number)
        length = self.what.system.draw(chance)
        return length, tuple(chained(repeat(number, length // BLOCK), chance.getrandbits(64)))

    def _talk(self, number: int) -> Talk:
        what, chance = self.what, self._chance("conversation", number)
        system = chance.choices(range(what.systems), cum_weights=self.weights)[0]
        length = self.system(system)[0]
        turns: list[Turn] = []
        said, called, going = length, False, True  # tokens up to the last answer; whether that calls a tool
        while going:
            after = self._after(chance, called) if turns else 0.0
            message = (what.result if called else what.message).draw(chance)
            going = chance.random() * what.turns >= 1.0
            called = going and chance.random() < what.tools
            answer = (what.call if called else what.answer).draw(chance)
            if over := said + message + answer > what.limit:
                said = length
            turns.append(Turn(said + message, answer, after, over))
            said += message + answer
        return Talk(system, length, tuple(turns), tuple(turn.after for turn in turns))

    def _after(self, chance: random.Random, called: bool) -> float:
        mean = self.what.wait if called else self.what.think
        return chance.expovariate(1.0) * mean

    def calls(self, number: int, at: float, count: int) -> Call:
        """The first `count` turns of a conversation that begins at `at` (s)."""
        talk = self.talk(number)
        blocks, chance = self.system(talk.system)[1], self._chance("blocks", number)
        made: list[tuple[Turn, tuple[int, ...]]] = []
        for turn in talk.turns[:count]:
            kept = blocks if turn.over or not made else made[-1][1]
            new = (turn.prompt + turn.answer) // BLOCK - len(kept)
            made.append((turn, kept + unshared(chance, new)))
        following: Call | None = None
        for turn, held in reversed(made):
            when = turn.after if turn is not made[0][0] else at
            following = Call(when, turn.prompt, turn.answer, blocks=held, then=following)
        assert following is not None
        return following

    def single(self, number: int, at: float) -> Call:
        """A request at `at` (s) that shares nothing."""
        what, chance = self.what, self._chance("single", number)
        output = what.answer.draw(chance)
        mean = max(1.0, what.prompt)
        prompt = LogNormal(mean, what.spread, max(1, what.limit - output)).draw(chance)
        return Call(at, prompt, output, blocks=unshared(chance, (prompt + output) // BLOCK))
