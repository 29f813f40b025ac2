"""PromQL as boards and rules write it: a strict parser that knows what each function takes.

It refuses what Prometheus refuses (brackets, functions, arguments, types), and some things that Prometheus
lets through and that mean nothing: a counter whose rate is not taken, a rate of a gauge, labels that a metric
lacks. Grafana's variables are values of labels, and `$__rate_interval` and `$__range` are durations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    "abs": ((VECTOR,), VECTOR),
    "round": ((VECTOR,), VECTOR),
    "vector": ((SCALAR,), VECTOR),
    "scalar": ((VECTOR,), SCALAR),
    "time": ((), SCALAR),
    "label_replace": ((VECTOR, STRING, STRING, STRING, STRING), VECTOR),
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


@dataclass
class Query:
    """What an expression asks for."""

    names: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)  # labels that it groups by or matches on


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
        kind = self._binary(0)
        if self._tokens[self._at][0] != "end":
            self._wrong(f"{self._tokens[self._at][1]!r} is too much")
        if kind not in {SCALAR, VECTOR}:
            self._wrong(f"gives {kind}")
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

    def _binary(self, level: int) -> str:
        if level == len(LEVELS):
            return self._unary()
        left = self._binary(level + 1)
        while sign := self._accept(*LEVELS[level]):
            compared_as_bool = sign in COMPARISONS and self._accept("bool") is not None
            self._matching()
            right = self._binary(level + 1)
            left = self._both(sign, left, right, compared_as_bool)
        return left

    def _both(self, sign: str, left: str, right: str, compared_as_bool: bool) -> str:
        if not {left, right} <= {SCALAR, VECTOR}:
            self._wrong(f"{sign} between {left} and {right}")
        if sign in SETS and SCALAR in {left, right}:
            self._wrong(f"{sign} is between vectors")
        if left == right == SCALAR:
            if sign in COMPARISONS and not compared_as_bool:
                self._wrong("numbers are compared with bool")
            return SCALAR
        return VECTOR

    def _matching(self) -> None:
        if self._accept("on", "ignoring"):
            self._query.groups |= self._labels()
            if self._accept("group_left", "group_right") and self._next() == "(":
                self._query.groups |= self._labels()

    def _labels(self) -> set[str]:
        self._expect("(")
        found = set()
        while self._accept(")") is None:
            found.add(self._take("name"))
            if self._next() != ")":
                self._expect(",")
        return found

    def _unary(self) -> str:
        if self._accept("-", "+"):
            kind = self._unary()
            if kind not in {SCALAR, VECTOR}:
                self._wrong(f"a sign before {kind}")
            return kind
        return self._primary()

    def _primary(self) -> str:
        kind, _ = self._tokens[self._at]
        if kind == "number":
            self._at += 1
            return SCALAR
        if kind == "string":
            self._at += 1
            return STRING
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

    def _aggregation(self, name: str) -> str:
        grouped = self._grouping()
        arguments = self._arguments(name)
        if not grouped:
            self._grouping()
        wanted = [SCALAR, VECTOR] if name in WITH_NUMBER else [VECTOR]
        if arguments != wanted:
            self._wrong(f"{name} takes {', '.join(wanted)}, not {', '.join(arguments)}")
        return VECTOR

    def _grouping(self) -> bool:
        if self._accept("by", "without") is None:
            return False
        self._query.groups |= self._labels()
        return True

    def _call(self, name: str) -> str:
        if name not in FUNCTIONS:
            self._wrong(f"no function {name!r} is known")
        takes, gives = FUNCTIONS[name]
        arguments = self._arguments(name)
        if tuple(arguments) != takes:
            self._wrong(f"{name} takes {', '.join(takes)}, not {', '.join(arguments)}")
        return gives

    def _arguments(self, name: str) -> list[str]:
        self._expect("(")
        self._inside.append(name)
        found = []
        while self._accept(")") is None:
            found.append(self._binary(0))
            if self._next() != ")":
                self._expect(",")
        self._inside.pop()
        return found

    def _selector(self, name: str) -> str:
        metric = self._known.get(name)
        if metric is None:
            raise PromQLError(f"no metric {name!r} is known: {self._text}")
        self._query.names.add(name)
        if self._accept("{"):
            self._matchers(name, metric)
        ranged = self._accept("[") is not None
        if ranged:
            self._take("duration")
            self._expect("]")
        if self._accept("offset"):
            self._take("duration")
        self._meant(name, metric, ranged)
        return RANGE if ranged else VECTOR

    def _matchers(self, name: str, metric: Known) -> None:
        while self._accept("}") is None:
            label = self._take("name")
            sign = self._accept("=", "!=", "=~", "!~")
            if sign is None:
                self._wrong(f"{self._next()!r} after the label {label}")
            value = self._take("string")[1:-1]
            self._matches(name, metric, label, sign or "", value)
            if self._next() != "}":
                self._expect(",")

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

    def _meant(self, name: str, metric: Known, ranged: bool) -> None:
        around = self._inside[-1] if self._inside else None
        if metric.kind == COUNTER and around not in {*COUNTED, "absent", "count"}:
            self._wrong(f"{name} is a counter, and no rate of it is taken")
        if metric.kind == GAUGE and around in COUNTED:
            self._wrong(f"{name} is a gauge, and has no {around}")
