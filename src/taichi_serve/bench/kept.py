"""A comparison on disk: every round with its probes and every request, written after each round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from taichi_serve.bench.contest import Contest, Round
from taichi_serve.bench.report import Result
from taichi_serve.bench.trial import Trial


@dataclass(frozen=True, slots=True)
class Kept:
    """What was asked, of whom, and what came of it so far."""

    target: str
    trial: Trial
    flags: dict[str, tuple[str, ...]]  # of each contender's server; none for one that was running
    date: str
    machine: str
    versions: dict[str, str]
    notes: tuple[str, ...]
    rounds: tuple[Round, ...]

    def same(self, target: str, trial: Trial, flags: dict[str, tuple[str, ...]]) -> bool:
        """Whether it answers this question. Contenders that were measured without each other do not."""
        return (self.target, self.trial, self.flags) == (target, trial, flags)

    @property
    def contest(self) -> Contest:
        """As far as it went."""
        return Contest(tuple(self.flags), self.trial, list(self.rounds))

    @property
    def results(self) -> list[Result]:
        """One for each contender."""
        contest = self.contest
        return [
            Result(
                name,
                self.target,
                self.trial,
                flags,
                contest.goodput(name),
                self.date,
                self.versions[name],
                self.machine,
                self.notes,
            )
            for name, flags in self.flags.items()
        ]


def write(kept: Kept, path: Path) -> None:
    """As JSON; an interrupted write leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(kept) + b"\n")
    new.replace(path)


def read(path: Path) -> Kept | None:
    """What was written before; None where there is nothing, or it is not one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kept)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
