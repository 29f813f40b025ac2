"""What a client asks for in headers: an SLO of its own, or a class of requests with one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from starlette.datastructures import Headers

from taichi_serve.classes import DEFAULT, Classes, SLOClass, Terms
from taichi_serve.frontend.names import asking
from taichi_serve.slo import SLO

# Ours, and those of llm-d for the same.
TTFT = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
TPOT = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
CLASS = "x-slo-class"
MILLISECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")
_OURS = "taichi_terms"


def note(terms: Terms) -> None:
    """Of the HTTP request in whose context we are."""
    state = asking.get()
    if state is not None:
        state[_OURS] = terms


def noted() -> Terms | None:
    """The terms of the HTTP request in whose context we are; None where none were made."""
    state = asking.get()
    return None if state is None else state.get(_OURS)


class TermsError(ValueError):
    """What a client asked for cannot be promised; `header` is the one that says it."""

    def __init__(self, header: str, why: str) -> None:
        super().__init__(f"{header}: {why}.")
        self.header = header


class Promises:
    """What may be asked for: the classes of a server, and the SLO that it promises where nothing is asked."""

    def __init__(self, classes: Classes, server: Callable[[], SLO], tell: bool = False) -> None:
        """Where requests are to be told, answers say by which SLO they are judged."""
        self.classes = classes
        self.server = server
        self.tell = tell
        # Looked up by its hash, a key is not found faster the more of it is right.
        self._by_key = {_hashed(key): one for one in classes.values() for key in one.keys}

    def of(self, headers: Headers) -> Terms:
        """The terms of a request with these headers; raises TermsError."""
        own = self._by_key.get(_hashed(_key(headers))) if self._by_key else None
        chosen = self._named(headers, own) or own or self.classes.get(DEFAULT)
        asked = {name: _seconds(headers, names) for name, names in (("ttft", TTFT), ("tpot", TPOT))}
        limits = chosen or SLOClass(DEFAULT)
        for name, names in (("ttft", TTFT), ("tpot", TPOT)):
            if (why := limits.beyond(name, asked[name])) is not None:
                raise TermsError(next(header for header in names if header in headers), why)
        slo = limits.slo(self.server(), asked["ttft"], asked["tpot"])
        return Terms(slo, None if chosen is None else chosen.name)

    def _named(self, headers: Headers, own: SLOClass | None) -> SLOClass | None:
        given = headers.getlist(CLASS)
        if not given:
            return None
        if len(given) > 1:
            raise TermsError(CLASS, "it is there more than once")
        found = self.classes.get(given[0])
        open_ones = [one.name for one in self.classes.values() if not one.keys or one is own]
        if found is None or found.name not in open_ones:
            there = f"there are {', '.join(open_ones)}" if open_ones else "this server has none"
            raise TermsError(CLASS, f"no class {given[0][:64]!r} for this client; {there}")
        return found


def _seconds(headers: Headers, names: tuple[str, ...]) -> float | None:
    """What these headers ask for, in seconds; all that are there must say the same."""
    given = [(name, value) for name in names for value in headers.getlist(name)]
    for name, value in given:
        if MILLISECONDS.fullmatch(value) is None or not float(value):
            raise TermsError(name, f"expected a positive number of milliseconds, not {value[:64]!r}")
    if len({float(value) for _, value in given}) > 1:
        raise TermsError(given[-1][0], f"{given[-1][1]} is not the {given[0][1]} of {given[0][0]}")
    return float(given[0][1]) / 1e3 if given else None


def _key(headers: Headers) -> str:
    return headers.get("authorization", "").partition(" ")[2]


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def said(terms: Terms, server: SLO) -> list[tuple[bytes, bytes]]:
    """Response headers with what a request is judged by."""
    slo = terms.slo or server
    lines = [
        (b"x-taichi-slo-ttft-ms", f"{slo.ttft * 1e3:.9g}"),
        (b"x-taichi-slo-tpot-ms", f"{slo.tpot * 1e3:.9g}"),
    ]
    if terms.slo_class is not None:
        lines.append((b"x-taichi-slo-class", terms.slo_class))
    return [(name, value.encode("ascii")) for name, value in lines]
