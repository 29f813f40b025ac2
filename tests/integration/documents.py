"""Requests whose output a grammar holds to a form, one of every kind, long enough to be moved three times.

The model says nonsense, and the grammar makes a document of it: its state hangs on every token so far.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
# So that a chat may have tools that must be called.
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
MOST = 400  # output tokens, for a document that does not end

LINE = {"type": "string", "minLength": 50, "maxLength": 90}
SCHEMA = {
    "type": "object",
    "properties": {
        "title": LINE,
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 8, "maxItems": 12},
        "colour": {"enum": ["red", "green", "blue"]},
        "author": {
            "type": "object",
            "properties": {"name": LINE, "alive": {"type": "boolean"}},
            "required": ["name", "alive"],
            "additionalProperties": False,
        },
        "lines": {"type": "array", "items": LINE, "minItems": 2, "maxItems": 3},
    },
    "required": ["title", "sizes", "colour", "author", "lines"],
    "additionalProperties": False,
}
# xgrammar does not know multiples, and guidance no patterns of names: vLLM gives these to another backend.
SEVENS = {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 9999}
MULTIPLES = {"type": "array", "items": SEVENS, "minItems": 30, "maxItems": 40}
WORD = {"type": "string", "pattern": "^[a-z]{60,70}$"}
PATTERNS = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": WORD, "minItems": 3, "maxItems": 3}},
    "patternProperties": {"^x-[a-z]{3,8}$": {"type": "string"}},
    "required": ["words"],
}
EBNF = 'root ::= item{30,60} "."\nitem ::= "<" [a-z]{2,9} ">" | "[" item "]"'
# Single tokens of the tiny model: white space, of which JSON may have any amount, and what ends an object.
DENSE = {"logit_bias": dict.fromkeys(("197", "198", "201", "220"), -100)}
OPEN = {"logit_bias": {**DENSE["logit_bias"], "92": -100}}
LARK = 'start: item~30..60 "."\nitem: "<" WORD ">" | "[" item "]"\nWORD: /[a-z]{2,9}/'
# They part late, and each is longer than three moves take.
CHOICE = [" ".join(["good"] * 40 + ["day"] * n + ["to", "you"] * (9 - n) + ["all"] * 20) for n in range(9)]


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


def _formed(kind: str, form: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, kind: form}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "json": (COMPLETIONS, {"structured_outputs": {"json": SCHEMA}, **DENSE}),
    "json_object": (COMPLETIONS, {"structured_outputs": {"json_object": True}, **OPEN}),
    "regex": (COMPLETIONS, {"structured_outputs": {"regex": "([a-z]{3,9} ){30,60}[0-9]{9}"}}),
    "choice": (COMPLETIONS, {"structured_outputs": {"choice": CHOICE}}),
    "ebnf": (COMPLETIONS, {"structured_outputs": {"grammar": EBNF}}),
    "lark": (COMPLETIONS, {"structured_outputs": {"grammar": LARK}}),
    "guidance": (COMPLETIONS, {"structured_outputs": {"json": MULTIPLES}, **DENSE}),
    "outlines": (COMPLETIONS, {"structured_outputs": {"json": PATTERNS}}),
    "response_format": (
        CHAT,
        {
            "response_format": _formed("json_schema", {"name": "poem", "strict": True, "schema": SCHEMA}),
            **DENSE,
        },
    ),
    "required": (CHAT, {"tools": [_tool("write"), _tool("print")], "tool_choice": "required", **DENSE}),
    "named": (
        CHAT,
        {
            "tools": [_tool("write"), _tool("print")],
            "tool_choice": _formed("function", {"name": "print"}),
            **DENSE,
        },
    ),
}


@dataclass(frozen=True)
class Document:
    """A request for one."""

    kind: str
    path: str
    body: dict[str, Any]


def documents(count: int, seed: int, model: str = "tiny", kinds: tuple[str, ...] = ()) -> list[Document]:
    """As many of each kind as of every other, with prompts of 20 to 700 tokens or so, greedy."""
    chance, made = random.Random(seed), []
    for kind in islice(cycle(kinds or KINDS), count):
        path, more = KINDS[kind]
        body = {"model": model, "max_tokens": MOST, "temperature": 0, "return_token_ids": True, **more}
        if path == CHAT:
            words = " ".join(f"{chance.randrange(10**6)}" for _ in range(chance.randint(3, 90)))
            body["messages"] = [{"role": "user", "content": f"Write about {words}."}]
        else:
            body["prompt"] = [chance.randrange(300, 4000) for _ in range(chance.randint(20, 700))]
        # So that the model does not fall into a rut of white space.
        made.append(Document(kind, path, {**body, "repetition_penalty": 1.2}))
    return made


def _json(text: str) -> bool:
    try:
        json.loads(text, strict=False)  # xgrammar lets control characters into a text
    except ValueError:
        return False
    return True


# Whether a text that ended by itself has the form.
HOLDS: dict[str, Callable[[str], bool]] = {
    "json": _json,
    "json_object": _json,
    "regex": lambda text: text[-9:].isdigit(),
    "choice": lambda text: text in CHOICE,
    "ebnf": lambda text: text.endswith("."),
    "lark": lambda text: text.endswith("."),
    "guidance": lambda text: all(number % 7 == 0 for number in json.loads(text)),
    "outlines": _json,
    "response_format": _json,
}
