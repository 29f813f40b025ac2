"""Suspects: who goes on at once, who waits for whom, who is ended, and that nobody innocent is."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm.server.quarantine import Quarantine
from taichi_serve.messages import Abort, Decode, Flow, Move, Outcome, Prefill, SetChunk
from taichi_serve.sliders import Kind


def prompt(request: str, leg: int = 1, on: str = "i1") -> Prefill:
    return Prefill(request, leg, on, hand_over=False)


def rescue(request: str, leg: int = 1, on: str = "i1") -> Decode:
    return Decode(request, leg, on, Move.RESCUE)


def test_without_a_loss_everything_is_admitted() -> None:
    quarantine = Quarantine()
    assert not quarantine
    assert all(quarantine.admit(c) for c in (prompt("p"), rescue("d"), SetChunk("i0", Kind.D_HEAVY, 64)))


def test_those_that_were_decoding_go_on_at_once_and_a_prompt_waits_for_all_of_them() -> None:
    quarantine = Quarantine()
    assert quarantine.lost("e0", ["a", "b"], ["p"]) == []
    assert quarantine.admit(rescue("a"))
    assert quarantine.admit(rescue("b"))
    assert not quarantine.admit(prompt("p"))
    assert quarantine.made("a", 2) == []
    assert quarantine.made("b") == []  # its first token: computed as a prompt is
    assert quarantine.made("b") == [prompt("p")]


def test_prompts_go_on_one_at_a_time_in_the_order_of_suspicion() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", [], ["p", "q", "r"])
    assert quarantine.admit(prompt("q"))  # the first whose place is known
    assert not quarantine.admit(prompt("p"))
    assert not quarantine.admit(prompt("r"))
    assert quarantine.made("q", 2) == [prompt("p")]
    assert quarantine.over("p") == [prompt("r")]
    assert quarantine.over("r") == []
    assert not quarantine


def test_the_last_command_for_each_counts() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", ["a"], ["p"])
    assert not quarantine.admit(prompt("p", leg=1, on="i1"))
    assert not quarantine.admit(prompt("p", leg=2, on="i2"))
    assert quarantine.over("a") == [prompt("p", leg=2, on="i2")]


def test_who_has_the_turn_may_do_whatever_it_is_told() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", [], ["p", "q"])
    assert quarantine.admit(prompt("p"))
    assert not quarantine.admit(prompt("q"))
    assert quarantine.admit(Decode("p", 2, "i2", Move.HAND_OVER))
    assert quarantine.admit(Flow("p", 3, "i1", Move.OPERATOR))


def test_the_second_death_under_it_ends_a_request() -> None:
    quarantine = Quarantine()
    assert quarantine.lost("e0", ["a"], ["p"]) == []
    quarantine.made("a", 2)
    assert quarantine.admit(prompt("p"))
    assert quarantine.lost("e1", ["a", "b"], ["p"]) == ["p"]
    assert quarantine.over("p") == []
    assert quarantine.suspects.keys() == {"a", "b"}


def test_who_only_waited_where_an_instance_died_is_no_suspect() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", [], ["p"])
    assert quarantine.admit(prompt("w"))


def test_who_was_cleared_begins_anew() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", ["a"], [])
    quarantine.made("a", 2)
    assert quarantine.lost("e1", ["a"], []) == []


def test_the_death_of_one_incarnation_counts_once() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", [], ["p"])
    assert quarantine.lost("e0", [], ["p"]) == []
    assert quarantine.lost("e0.2", [], ["p"]) == ["p"]


def test_a_turn_is_given_up_when_its_instance_dies_and_others_are_suspects_now() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", [], ["p"])
    assert quarantine.admit(prompt("p"))
    assert quarantine.lost("e1", ["a"], []) == []  # p was queued there, and not computed
    assert not quarantine.admit(prompt("p", leg=2, on="i2"))
    assert quarantine.over("a") == [prompt("p", leg=2, on="i2")]


def test_an_abort_is_never_kept() -> None:
    quarantine = Quarantine()
    quarantine.lost("e0", ["a"], ["p"])
    assert quarantine.admit(Abort("p", Outcome.CANCELLED, "the client left"))


def test_prompts_of_an_instance_that_hangs_go_on_alone_and_are_free_when_it_answers() -> None:
    quarantine = Quarantine()
    quarantine.silent("e0", ["p", "q"])
    assert quarantine.admit(prompt("p"))
    assert not quarantine.admit(prompt("q"))
    assert quarantine.answered("e0") == [prompt("q")]
    assert not quarantine


def test_a_prompt_that_a_second_instance_hangs_under_waits_until_that_one_answers() -> None:
    quarantine = Quarantine()
    quarantine.silent("e0", ["p", "q"])
    assert quarantine.admit(prompt("p"))
    quarantine.silent("e1", ["p"])
    assert not quarantine.admit(prompt("p", leg=2, on="i2"))
    assert quarantine.admit(prompt("q"))  # the next one's turn
    assert quarantine.made("q", 2) == []
    assert quarantine.answered("e1") == [prompt("p", leg=2, on="i2")]


def test_a_prompt_that_two_instances_hang_under_is_ended_when_both_are() -> None:
    quarantine = Quarantine()
    quarantine.silent("e0", ["p"])
    quarantine.admit(prompt("p"))
    quarantine.silent("e1", ["p"])
    assert quarantine.lost("e0", [], []) == []
    assert quarantine.lost("e1", [], []) == ["p"]


# ------------------------------------------------------------------------------------- random histories


@dataclass
class World:
    """Instances that compute a few prompts a step in a random order, and die of one request's prompt."""

    chance: random.Random
    poison: str
    quarantine: Quarantine = field(default_factory=Quarantine)
    alive: list[str] = field(default_factory=lambda: ["i0", "i1", "i2"])
    queued: dict[str, list[str]] = field(default_factory=dict)  # prompts, and decodes that are computed again
    decoding: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    deaths: int = 0

    def start(self, decodes: int, prompts: int) -> None:
        for name in self.alive:
            self.queued[name], self.decoding[name] = [], []
        for k in range(decodes):
            self.decoding[self.chance.choice(self.alive)].append(f"d{k}")
            self.tokens[f"d{k}"] = 20
        names = [f"p{k}" for k in range(prompts)] + [self.poison]
        self.chance.shuffle(names)
        for name in names:
            self.tokens[name] = 0
            self.queued[self.chance.choice(self.alive)].append(name)

    def place(self, request: str) -> None:
        on = self.chance.choice(self.alive)
        command = rescue(request, on=on) if self.tokens[request] else prompt(request, on=on)
        if self.quarantine.admit(command):
            self.queued[on].append(request)

    def release(self, commands: list[Prefill | Decode]) -> None:
        for command in commands:
            assert command.on in self.alive or len(self.alive) < 3
            if command.on in self.alive:
                self.queued[command.on].append(command.request)
            else:
                self.place(command.request)

    def step(self, name: str) -> None:
        """A few of the queue, with every decode; none of them in order: an engine's own reasons."""
        computed = self.queued[name][: self.chance.randint(1, 3)]
        if self.poison in computed:
            self.die(name, computed)
            return
        self.queued[name] = self.queued[name][len(computed) :]
        for request in self.decoding[name] + computed:
            self.tokens[request] += 1
            self.release(self.quarantine.made(request))
        self.decoding[name] += computed

    def die(self, name: str, computed: list[str]) -> None:
        self.deaths += 1
        self.alive.remove(name)
        queued, decoding = self.queued.pop(name), self.decoding.pop(name)
        old = [request for request in decoding if self.tokens[request] >= 8]
        young = [request for request in decoding if self.tokens[request] < 8]
        for request in self.quarantine.lost(name, old, computed + young):
            self.ended.append(request)
            self.release(self.quarantine.over(request))
        for request in queued + decoding:
            if request not in self.ended:
                self.place(request)

    def settled(self) -> bool:
        return all(n >= 12 for request, n in self.tokens.items() if request not in self.ended)


@given(st.integers(0, 40), st.integers(0, 20), st.randoms(use_true_random=False))
def test_one_poison_prompt_takes_two_instances_at_most_and_nobody_with_it(
    decodes: int, prompts: int, chance: random.Random
) -> None:
    world = World(chance, "poison")
    world.start(decodes, prompts)
    for _ in range(2000):
        if world.settled():
            break
        world.step(chance.choice(world.alive))
    assert world.settled(), "somebody waits for ever"
    assert world.ended == ["poison"]
    assert world.deaths == 2
    assert not any(s.held for s in world.quarantine.suspects.values())
