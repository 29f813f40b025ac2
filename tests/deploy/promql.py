"""PromQL as boards and rules write it: a strict parser that knows what each function takes.

It refuses what Prometheus refuses (brackets, functions, arguments, types), and some things that Prometheus
lets through and that mean nothing: a counter whose rate is not taken, a rate of a gauge, labels that a metric
lacks. Grafana's variables are values of labels, and `$__rate_interval` and `$__range` are durations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCALAR, VECTOR, RANGE, STRING = "a number", "a vector", "a range", "a string"
COUNTER, GAUGE = "counter", "gauge"

# What each function takes, and gives.
Signature = tuple[tuple[str, ...], str]
COUNTED: dict[str, Signature] = dict.fromkeys(("rate", "increase", "irate", "resets"), ((RANGE,), VECTOR))
OVER = ("avg_over_time", "min_over_time", "max_over_time", "last_over_time", "changes", "delta", "deriv")
OVER_TIME: dict[str, Signature] = dict.fromkeys(OVER, ((RANGE,), VECTOR))
PLAIN: dict[str, Signature] = {
    "histogram_quantile": ((SCALAR, VECTOR), VECTOR),
    "clamp_min": ((VECTOR, SCALAR), VECTOR),
    "clamp_max": ((VECTOR, SCALAR), VECTOR),
    "absent": ((VECTOR,), VECTOR),
    "vector": ((SCALAR,), VECTOR),
}
FUNCTIONS = COUNTED | OVER_TIME | PLAIN
AGGREGATIONS = ("sum", "avg", "min", "max", "count", "group", "stddev")
WITH_NUMBER = ("topk", "bottomk", "quantile")
LEVELS = (("or",), ("and", "unless"), ("==", "!=", "<=", ">=", "<", ">"), ("+", "-"), ("*", "/", "%"), ("^",))
COMPARISONS, SETS = LEVELS[2], ("or", "and", "unless")
WORDS = {
    "or",
    "and",
    "unless",
    "bool",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "offset",
}

TOKEN = re.compile(
    r"""\s*(?:
    (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<duration>\$__rate_interval|\$__range|\d+(?:ms|[smhdwy])(?:\d+(?:ms|[smhdwy]))*(?!\w))
    |(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?!\w))
    |(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
    |(?P<sign>==|!=|<=|>=|=~|!~|[-+*/%^<>=(){}\[\],])
    )""",
    re.VERBOSE,
)


class PromQLError(ValueError):
    """It would not work, or would not mean anything."""


@dataclass(frozen=True)
class Known:
    """A metric that a server can export: by the name of its samples, with the values of its labels."""

    kind: str
    labels: Mapping[str, frozenset[str] | None]  # None: any value


@dataclass(frozen=True)
class Node:
    """A part of an expression: what it gives, which part it is, and what that consists of."""

    gives: str
    what: str  # number, text, negative, binary, aggregate, call or select
    of: tuple[Any, ...]


@dataclass
class Query:
    """What an expression asks for."""

    names: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)  # labels that it groups by or matches on
    tree: Node = Node(SCALAR, "number", (0.0,))


def parsed(text: str, known: Mapping[str, Known]) -> Query:
    """Parse one expression, or raise what is wrong with it."""
    return _Parser(text, known).whole()


class _Parser:
    def __init__(self, text: str, known: Mapping[str, Known]) -> None:
        self._text, self._known = text, known
        self._tokens = self._split(text)
        self._at = 0
        self._query = Query()
        self._inside: list[str] = []  # functions around what is being read

    def _split(self, text: str) -> list[tuple[str, str]]:
        tokens, at = [], 0
        text = text.rstrip()
        while at < len(text):
            if (found := TOKEN.match(text, at)) is None or found.lastgroup is None:
                raise PromQLError(f"cannot read on at {text[at : at + 20]!r} in {text}")
            tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        return [*tokens, ("end", "")]

    def whole(self) -> Query:
        self._query.tree = self._binary(0)
        if self._tokens[self._at][0] != "end":
            self._wrong(f"{self._tokens[self._at][1]!r} is too much")
        if self._query.tree.gives not in {SCALAR, VECTOR}:
            self._wrong(f"gives {self._query.tree.gives}")
        return self._query

    def _wrong(self, why: str) -> None:
        raise PromQLError(f"{why}: {self._text}")

    def _next(self) -> str:
        return self._tokens[self._at][1]

    def _take(self, kind: str) -> str:
        found, text = self._tokens[self._at]
        if found != kind:
            self._wrong(f"{text or 'the end'!r} where {kind} belongs")
        self._at += 1
        return text

    def _accept(self, *words: str) -> str | None:
        kind, text = self._tokens[self._at]
        if kind in {"name", "sign"} and text in words:
            self._at += 1
            return text
        return None

    def _expect(self, sign: str) -> None:
        if self._accept(sign) is None:
            self._wrong(f"{self._next() or 'the end'!r} where {sign!r} belongs")

    def _binary(self, level: int) -> Node:
        if level == len(LEVELS):
            return self._unary()
        left = self._binary(level + 1)
        while sign := self._accept(*LEVELS[level]):
            as_bool = sign in COMPARISONS and self._accept("bool") is not None
            matched = self._matching()
            right = self._binary(level + 1)
            left = Node(
                self._both(sign, left.gives, right.gives, as_bool), "binary", (sign, left, right, matched)
            )
        return left

    def _both(self, sign: str, left: str, right: str, as_bool: bool) -> str:
        if not {left, right} <= {SCALAR, VECTOR}:
            self._wrong(f"{sign} between {left} and {right}")
        if sign in SETS and SCALAR in {left, right}:
            self._wrong(f"{sign} is between vectors")
        if left == right == SCALAR:
            if sign in COMPARISONS and not as_bool:
                self._wrong("numbers are compared with bool")
            return SCALAR
        return VECTOR

    def _matching(self) -> bool:
        """Whether labels are matched otherwise than all with all."""
        if not self._accept("on", "ignoring"):
            return False
        self._query.groups |= self._labels()
        if self._accept("group_left", "group_right") and self._next() == "(":
            self._query.groups |= self._labels()
        return True

    def _labels(self) -> set[str]:
        self._expect("(")
        found = set()
        while self._accept(")") is None:
            found.add(self._take("name"))
            if self._next() != ")":
                self._expect(",")
        return found

    def _unary(self) -> Node:
        sign = self._accept("-", "+")
        if sign is None:
            return self._primary()
        inner = self._unary()
        if inner.gives not in {SCALAR, VECTOR}:
            self._wrong(f"a sign before {inner.gives}")
        return Node(inner.gives, "negative", (inner,)) if sign == "-" else inner

    def _primary(self) -> Node:
        kind, text = self._tokens[self._at]
        if kind in {"number", "string"}:
            self._at += 1
            return (
                Node(SCALAR, "number", (float(text),)) if kind == "number" else Node(STRING, "text", (text,))
            )
        if self._accept("("):
            inner = self._binary(0)
            self._expect(")")
            return inner
        name = self._take("name")
        if name in WORDS:
            self._wrong(f"{name!r} does not belong there")
        if name in (*AGGREGATIONS, *WITH_NUMBER):
            return self._aggregation(name)
        return self._call(name) if self._next() == "(" else self._selector(name)

    def _aggregation(self, name: str) -> Node:
        grouped = self._grouping()
        arguments = self._arguments(name)
        if grouped is None:
            grouped = self._grouping()
        wanted = [SCALAR, VECTOR] if name in WITH_NUMBER else [VECTOR]
        if (given := [one.gives for one in arguments]) != wanted:
            self._wrong(f"{name} takes {', '.join(wanted)}, not {', '.join(given)}")
        return Node(VECTOR, "aggregate", (name, arguments, grouped or ("by", set())))

    def _grouping(self) -> tuple[str, set[str]] | None:
        word = self._accept("by", "without")
        if word is None:
            return None
        labels = self._labels()
        self._query.groups |= labels
        return word, labels

    def _call(self, name: str) -> Node:
        if name not in FUNCTIONS:
            self._wrong(f"no function {name!r} is known")
        takes, gives = FUNCTIONS[name]
        arguments = self._arguments(name)
        if (given := tuple(one.gives for one in arguments)) != takes:
            self._wrong(f"{name} takes {', '.join(takes)}, not {', '.join(given)}")
        return Node(gives, "call", (name, arguments))

    def _arguments(self, name: str) -> list[Node]:
        self._expect("(")
        self._inside.append(name)
        found = []
        while self._accept(")") is None:
            found.append(self._binary(0))
            if self._next() != ")":
                self._expect(",")
        self._inside.pop()
        return found

    def _selector(self, name: str) -> Node:
        metric = self._known.get(name)
        if metric is None:
            raise PromQLError(f"no metric {name!r} is known: {self._text}")
        self._query.names.add(name)
        matchers = self._matchers(name, metric) if self._accept("{") else []
        window = None
        if self._accept("["):
            window = self._take("duration")
            self._expect("]")
        if self._accept("offset"):
            self._take("duration")
        self._meant(name, metric)
        return Node(VECTOR if window is None else RANGE, "select", (name, matchers, window))

    def _matchers(self, name: str, metric: Known) -> list[tuple[str, str, str]]:
        found = []
        while self._accept("}") is None:
            label = self._take("name")
            sign = self._accept("=", "!=", "=~", "!~")
            if sign is None:
                self._wrong(f"{self._next()!r} after the label {label}")
            value = self._take("string")[1:-1]
            self._matches(name, metric, label, sign or "", value)
            found.append((label, sign or "", value))
            if self._next() != "}":
                self._expect(",")
        return found

    def _matches(self, name: str, metric: Known, label: str, sign: str, value: str) -> None:
        if label not in metric.labels:
            self._wrong(f"{name} has no label {label!r}")
        values = metric.labels[label]
        if values is None or value.startswith("$"):
            return
        wanted = value.split("|") if sign in {"=~", "!~"} else [value]
        for one in wanted:
            if one not in values:
                self._wrong(f"the label {label!r} of {name} is never {one!r}")

    def _meant(self, name: str, metric: Known) -> None:
        around = self._inside[-1] if self._inside else None
        if metric.kind == COUNTER and around not in {*COUNTED, "absent", "count"}:
            self._wrong(f"{name} is a counter, and no rate of it is taken")
        if metric.kind == GAUGE and around in COUNTED:
            self._wrong(f"{name} is a gauge, and has no {around}")
