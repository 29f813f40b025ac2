"""Which requests may have killed an instance, and how they go on without killing all. No I/O, no clock.

Whoever was being computed when an instance died is a suspect. A suspect that makes CLEAR tokens elsewhere is
cleared. One that an instance dies under for the second time is ended, and never tried a third time.

So that nobody innocent is ended with it, no two of them may be under suspicion where the second death comes:

- Suspects that had been decoding go on at once, anywhere: what kills an engine is nearly always a prompt.
- The others, whose prompt was being computed (or who had hardly begun to decode), wait until all those are
  cleared. Then they go on one at a time in the whole cluster; the last command for each is kept until then.

With one request that kills whoever computes its prompt, two instances die: the first under everybody who was
there, the second under this one suspect alone.

An instance that hangs is not dead yet. The first time, the prompts in its step are suspects and go on
elsewhere, one at a time. One that another instance hangs under waits until that instance answers (then it
goes on) or is ended (then so is the request).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from taichi_serve.messages import Abort, Command, Decode, Move, Prefill, SetChunk

# Tokens a suspect makes before it is cleared: a prompt is computed in one way, every later token in another.
CLEAR = 2


@dataclass(slots=True)
class Suspect:
    """One request under suspicion."""

    alone: bool  # it is computed only when no other such suspect is
    under: set[str] = field(default_factory=set)  # instances that died, or hang, while they computed it
    hangs: str | None = None  # the second instance that hangs under it
    made: int = 0  # tokens since the last of these
    held: Command | None = None  # its command, until its turn


class Quarantine:
    """All suspects of one server. Instances go by the ids of their incarnations."""

    def __init__(self) -> None:
        self.suspects: dict[str, Suspect] = {}  # in the order of suspicion
        self.turn: str | None = None  # which of those that go on alone does so now

    def __bool__(self) -> bool:
        return bool(self.suspects)

    # -------------------------------------------------------------------------------- what happens to engines

    def lost(self, engine: str, decodes: Iterable[str], prompts: Iterable[str]) -> list[str]:
        """An instance died while it computed these requests. Those that this was the second time for are to
        be ended, and are in the answer; call `over` for each."""
        hung = [name for name, suspect in self.suspects.items() if engine in (suspect.hangs, *suspect.under)]
        alone = dict.fromkeys(prompts)
        guilty = []
        for name in dict.fromkeys((*decodes, *alone, *hung)):
            suspect = self.suspects.get(name)
            if suspect is None:
                suspect = self.suspects[name] = Suspect(name in alone)
            suspect.under.add(engine)
            suspect.made = 0
            if suspect.hangs == engine:
                suspect.hangs = None
            if len(suspect.under) > 1:
                guilty.append(name)
        return guilty

    def silent(self, engine: str, prompts: Iterable[str]) -> None:
        """An instance hangs in a step that computes these prompts."""
        for name in prompts:
            suspect = self.suspects.setdefault(name, Suspect(alone=True))
            if suspect.under - {engine}:
                suspect.hangs = engine
                self.turn = None if self.turn == name else self.turn
            else:
                suspect.under.add(engine)

    def answered(self, engine: str) -> list[Command]:
        """An instance that hung answers again: nobody is a suspect because of it. What may go on now."""
        released: list[Command] = []
        for name, suspect in list(self.suspects.items()):
            if suspect.hangs == engine:
                suspect.hangs = None
            elif engine in suspect.under:
                released += self._drop(name, keep=True)
        return released + self._next()

    # ------------------------------------------------------------------------------- what happens to requests

    def admit(self, command: Command) -> bool:
        """Whether a decision may be carried out now. If not it is kept: the last one for each request."""
        if isinstance(command, SetChunk | Abort):
            return True
        suspect = self.suspects.get(command.request)
        if suspect is None or not suspect.alone:
            return True
        if self.turn == command.request and _anew(command):
            self.turn = None  # others may have become suspects meanwhile
        if self.turn is None and self._free() and suspect.hangs is None:
            self.turn = command.request
        if self.turn == command.request:
            suspect.held = None
            return True
        suspect.held = command
        return False

    def made(self, request: str, tokens: int = 1) -> list[Command]:
        """A request made tokens. If that clears a suspect: the commands that are to be carried out now."""
        suspect = self.suspects.get(request)
        if suspect is None:
            return []
        suspect.made += tokens
        return self.cleared(request) if suspect.made >= CLEAR else []

    def cleared(self, request: str) -> list[Command]:
        """It goes on, and no instance died: it is a suspect no more. The commands that may go on now."""
        return [*self._drop(request, keep=True), *self._next()] if request in self.suspects else []

    def over(self, request: str) -> list[Command]:
        """It ended. The commands that may go on now."""
        if request not in self.suspects:
            return []
        self._drop(request, keep=False)
        return self._next()

    def _drop(self, name: str, keep: bool) -> list[Command]:
        suspect = self.suspects.pop(name)
        if self.turn == name:
            self.turn = None
        return [suspect.held] if keep and suspect.held is not None else []

    def _free(self) -> bool:
        """Whether nobody is in the way of those that go on alone."""
        return all(suspect.alone for suspect in self.suspects.values())

    def _next(self) -> list[Command]:
        """The next one's turn, if nobody has it and its command is known."""
        if self.turn is not None or not self._free():
            return []
        for name, suspect in self.suspects.items():
            if suspect.held is not None and suspect.hangs is None:
                command, suspect.held, self.turn = suspect.held, None, name
                return [command]
        return []


def _anew(command: Command) -> bool:
    """Whether it is computed from its beginning, because it lost its place."""
    return isinstance(command, Prefill) or (isinstance(command, Decode) and command.move is Move.RESCUE)
