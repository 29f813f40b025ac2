"""What was measured so far: FILE.part, one line of JSON for each cell and move, until the profile is written.

Whoever is interrupted goes on from there. The first line says of what it is; a last line that was torn by the
interruption is measured again.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import msgspec

from taichi_serve.latency.identity import Identity
from taichi_serve.latency.profile import SCHEMA, ProfileError, StepRow
from taichi_serve.profiling.grid import Cell, Hop


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line."""

    schema: int
    engine: Identity


class Steps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="steps"):
    """A cell, measured once."""

    cell: Cell
    rows: list[StepRow]


class Moved(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="move"):
    """A move, measured once: KV tokens that came over, the seconds between two tokens, and those of a step of
    that decode on the target."""

    hop: Hop
    kv_tokens: int
    gap: float
    step: float


class Draft:
    """The cells and moves in one file, each as often as it was measured. What is added is on the disk when
    `add` returns."""

    def __init__(self, path: Path, engine: Identity) -> None:
        """Open or begin it. Raises ProfileError where that cannot be, or if it is of another engine."""
        self.path = path
        self.engine = engine
        self.cells: dict[Cell, list[list[StepRow]]] = defaultdict(list)
        self.moves: dict[Hop, list[Moved]] = defaultdict(list)
        try:
            head, *lines = (path.read_bytes() if path.exists() else b"").splitlines() or [b""]
            if head:
                self._check(head, bool(lines))
                self._take(lines)
            self._rewrite()
        except OSError as wrong:
            raise ProfileError(f"{path}: cannot be written: {wrong.strerror}") from wrong

    def _check(self, head: bytes, counts: bool) -> None:
        """Of what it is, is of no account where nothing was measured yet."""
        try:
            same = msgspec.json.decode(head, type=Head) == Head(SCHEMA, self.engine) or not counts
        except msgspec.MsgspecError:
            same = False
        if not same:
            raise ProfileError(
                f"{self.path}: was measured with another model, device, version or setting; "
                "remove it to begin anew"
            )

    def _take(self, lines: list[bytes]) -> None:
        for line in lines:
            try:
                self._keep(msgspec.json.decode(line, type=Steps | Moved))
            except msgspec.MsgspecError:
                return  # torn here: what is not known is measured again

    def _keep(self, item: Steps | Moved) -> None:
        if isinstance(item, Steps):
            self.cells[item.cell].append(item.rows)
        else:
            self.moves[item.hop].append(item)

    def _rewrite(self) -> None:
        """The same without a torn line, so that the next one does not stick to it."""
        head = msgspec.json.encode(Head(SCHEMA, self.engine))
        done = [Steps(cell, rows) for cell, times in self.cells.items() for rows in times]
        moved = [move for times in self.moves.values() for move in times]
        lines = [head, *(msgspec.json.encode(item) for item in (*done, *moved))]
        self.path.write_bytes(b"".join(line + b"\n" for line in lines))

    def add(self, item: Steps | Moved) -> None:
        """Keep what was just measured."""
        self._keep(item)
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(item) + b"\n")

    def remove(self) -> None:
        """The profile is written: nothing of this is needed any more."""
        self.path.unlink()
