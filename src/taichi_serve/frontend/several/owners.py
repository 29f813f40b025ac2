"""Which front end a request belongs to, and which outputs are whose. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Output(Protocol):
    """What an engine made for one request."""

    request_id: str


T = TypeVar("T", bound=Output)


class Owners:
    """Requests that are open, each with the front end that it came from."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._of)

    def take(self, request: str, owner: int) -> None:
        """This front end brought it."""
        self._of[request] = owner

    def of(self, request: str) -> int | None:
        """Whose it is; None where it is over, or its owner is."""
        return self._of.get(request)

    def over(self, request: str) -> None:
        """It is over."""
        self._of.pop(request, None)

    def lose(self, owner: int) -> list[str]:
        """This front end is gone: its requests, which nobody owns any more."""
        gone = [request for request, by in self._of.items() if by == owner]
        for request in gone:
            del self._of[request]
        return gone

    def count(self, owner: int) -> int:
        """How many of its requests are open."""
        return sum(by == owner for by in self._of.values())

    def split(self, outputs: Iterable[T]) -> dict[int, list[T]]:
        """Outputs by owner, in order. What is nobody's is left out."""
        found: dict[int, list[T]] = {}
        of = self._of
        for output in outputs:
            if (owner := of.get(output.request_id)) is not None:
                if (mine := found.get(owner)) is None:
                    mine = found[owner] = []
                mine.append(output)
        return found
