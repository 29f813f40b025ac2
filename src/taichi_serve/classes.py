"""Classes of requests: what is promised to each, what its requests may ask for, and what may be done to them.

A class stands in the config of a server, or in a file of a measurement, under its name:

    interactive:
      ttft_slo: 1
      tpot_slo: 0.04
      keys: [sk-app]
    batch:
      ttft_slo: 10
      tpot_slo: 0.2
      ttft_bounds: [5, 600]
      weight: 0.5

The class of a request that names none is the one called `default`, if there is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from taichi_serve.slo import SLO

DEFAULT = "default"
ANYTHING = (0.0, math.inf)
LONGEST_NAME = 64  # characters


@dataclass(frozen=True, slots=True)
class SLOClass:
    """One class. SLOs are in seconds, None where it has the server's.

    `ttft_bounds`, `tpot_bounds`  the least and the most seconds that a request of it may ask for.
    `weight`   the lowest goes first under overload; with fair shares, its part of what is computed in time.
    `refuse`   whether its requests may be refused under overload.
    `demote`   whether its requests may be served as best effort under overload.
    `keys`     API keys whose requests are of this class; nobody else may then name it.
    `share`    its part of the requests of a measurement, beside those of the others.
    """

    name: str
    ttft_slo: float | None = None
    tpot_slo: float | None = None
    ttft_bounds: tuple[float, float] = ANYTHING
    tpot_bounds: tuple[float, float] = ANYTHING
    weight: float = 1.0
    refuse: bool = True
    demote: bool = True
    keys: tuple[str, ...] = field(default=(), repr=False)
    share: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < len(self.name) <= LONGEST_NAME and self.name.isascii() and self.name.isprintable()):
            raise ValueError(f"a name of 1 to {LONGEST_NAME} printable ASCII characters, not {self.name!r}")
        if self.name == DEFAULT and (self.ttft_slo, self.tpot_slo) != (None, None):
            raise ValueError("its SLO is that of the server: --ttft-slo and --tpot-slo")
        for name in ("ttft_slo", "tpot_slo", "weight", "share"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        for name in ("ttft", "tpot"):
            low, high = getattr(self, f"{name}_bounds")
            own = getattr(self, f"{name}_slo")
            if not 0 <= low <= high:
                raise ValueError(f"{name}_bounds must be the least and the most seconds, not {low}, {high}")
            if own is not None and not low <= own <= high:
                raise ValueError(f"{name}_slo {own:g} is outside of {name}_bounds {low:g} to {high:g}")

    def slo(self, server: SLO, ttft: float | None = None, tpot: float | None = None) -> SLO | None:
        """The SLO of a request of this class that asks for this (seconds); None where it is the server's."""
        own = ttft or self.ttft_slo, tpot or self.tpot_slo
        return None if own == (None, None) else SLO(own[0] or server.ttft, own[1] or server.tpot)

    def beyond(self, name: str, asked: float | None) -> str | None:
        """Why a request of this class may not ask for this "ttft" or "tpot" (seconds), or None."""
        low, high = getattr(self, f"{name}_bounds")
        if asked is None or low <= asked <= high:
            return None
        least = f"{low * 1e3:.9g}"
        within = f"{least} to {high * 1e3:.9g} ms" if math.isfinite(high) else f"at least {least} ms"
        return f"{asked * 1e3:.9g} ms is not within the bounds of class {self.name}, {within}"


Classes = Mapping[str, SLOClass]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request is judged by: its SLO, None for the server's, and its class, None where it has none."""

    slo: SLO | None = None
    slo_class: str | None = None


PLAIN = Terms()  # those of most requests


def read_classes(text: str) -> dict[str, SLOClass]:
    """The classes of a JSON object, or of a file with that or YAML; ValueError in one line names the class
    and the field that is wrong."""
    try:
        raw = json.loads(text) if text.lstrip().startswith("{") else _file(text)
    except json.JSONDecodeError as wrong:
        raise ValueError(f"no JSON: {wrong}") from None
    return classes_of(raw)


def _file(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as wrong:
        raise ValueError(f"{path}: {wrong.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        raise ValueError(f"{path}: no YAML: {' '.join(str(wrong).split())}") from None


def classes_of(raw: Any) -> dict[str, SLOClass]:
    """Classes by name, from plain objects; raises ValueError."""
    if not isinstance(raw, dict) or not raw:
        raise ValueError("classes are an object with one object for each name")
    found: dict[str, SLOClass] = {}
    for name, words in raw.items():
        try:
            found[str(name)] = SLOClass(str(name), **dict(_fields(words)))
        except ValueError as wrong:
            said = str(name) if str(name).isprintable() else repr(name)
            raise ValueError(f"class {said}: {wrong}") from None
    _check_keys(found)
    return found


def plain(classes: Classes) -> dict[str, Any]:
    """The plain objects that `classes_of` makes these of."""
    return {name: dict(_said(one)) for name, one in classes.items()}


def _said(one: SLOClass) -> Iterator[tuple[str, Any]]:
    usual = SLOClass(one.name)
    for name in (each.name for each in fields(SLOClass)):
        value = getattr(one, name)
        if value != getattr(usual, name):
            yield name, list(value) if isinstance(value, tuple) else value


def _check_keys(found: Classes) -> None:
    seen: dict[str, str] = {}
    for one in found.values():
        for key in one.keys:
            if key in seen:
                raise ValueError(f"class {one.name}: one of its keys is a key of class {seen[key]} too")
            seen[key] = one.name


def _fields(words: Any) -> Iterator[tuple[str, Any]]:
    """The values of a class, each of the type that its field has."""
    if not isinstance(words, dict):
        raise ValueError(f"expected an object with its fields, not {words!r}")
    known = [one.name for one in fields(SLOClass) if one.name != "name"]
    for name, value in words.items():
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
        yield name, _typed(name, value)


def _typed(name: str, value: Any) -> Any:
    if name in ("refuse", "demote"):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return value
    if name == "keys":
        if not (isinstance(value, list) and all(isinstance(key, str) and key for key in value)):
            raise ValueError("keys must be a list of texts")
        return tuple(value)
    if name.endswith("_bounds"):
        if not (isinstance(value, list) and len(value) == 2):
            raise ValueError(f"{name} must be two numbers, the least and the most seconds, not {value!r}")
        return tuple(_number(name, one) for one in value)
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return float(value)
