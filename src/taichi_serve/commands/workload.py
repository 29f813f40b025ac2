"""The demo's requests: seeded, short and long, chat and completion, arriving as a Poisson process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

TEXT = """\
about after again air all also animal answer ask away back because before began below between big book
boy both bring call came can car change city close cold come could country day did different do does done
door down each early earth eat end enough even ever every eye face family far fast father few find fire
first follow food for form found four from full gave get give go good great ground grow had half hand
hard"""
WORDS = TEXT.split()

SHORT, LONG = (10, 90), (900, 1400)  # words of a prompt
LONG_SHARE = 0.35
OUTPUT = (16, 80)  # tokens
BY_HAND_WORDS, BY_HAND_OUTPUT = 300, 240


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: when it is sent (seconds from the start), and what."""

    number: int
    at: float
    chat: bool
    words: int
    output: int
    text: str
    by_hand: bool = False  # an operator moves this one while it runs

    @property
    def path(self) -> str:
        """The OpenAI route it goes to."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        """What is posted, without the streaming flags."""
        text = {"messages": [{"role": "user", "content": self.text}]} if self.chat else {"prompt": self.text}
        return {"model": model, **text, "max_tokens": self.output, "temperature": 0, "ignore_eos": True}


def plan(count: int, rate: float, seed: int) -> list[Planned]:
    """`count` requests at `rate` a second; the one an operator moves is a quarter down the list."""
    chance = random.Random(seed)
    at = 0.0
    planned = []
    for number in range(count):
        at += chance.expovariate(rate)
        by_hand = number == count // 4
        words = chance.randint(*(LONG if chance.random() < LONG_SHARE else SHORT))
        output = chance.randint(*OUTPUT)
        if by_hand:
            words, output = BY_HAND_WORDS, BY_HAND_OUTPUT
        text = " ".join(chance.choices(WORDS, k=words))
        planned.append(Planned(number, at, chance.random() < 0.5, words, output, text, by_hand))
    return planned
