"""How far a command is, on a terminal: a bar that looks for itself, or a line with the time so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

Tell = Callable[[str], None]


class Following(Progress):
    """A bar that asks how far the work is whenever it is drawn: the work itself need not speak."""

    def __init__(self, console: Console, what: str, total: int, done: Callable[[], int]) -> None:
        """Of `total`, `done()` are done; it is called in another thread."""
        self._done = done
        self._bar: TaskID | None = None  # rich draws once before there is one
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar = self.add_task(what, total=total)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, with how far it is now."""
        if self._bar is not None:
            self.update(self._bar, completed=self._done())
        yield from super().get_renderables()


@contextmanager
def working(console: Console, what: str) -> Iterator[Tell]:
    """A line that says what is done and for how long by now; who is yielded changes what it says."""
    columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    # Where nobody looks rich would still end the line that it has not written.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task(what, total=None)

        def tell(words: str) -> None:
            progress.update(line, description=words)

        yield tell
