"""The directory of one server's logs and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Say = Callable[[str], None]


@dataclass(slots=True)
class Scratch:
    """The directory; `keep` is set when somebody will want the logs."""

    path: Path
    keep: bool = False


@contextlib.contextmanager
def scratch(say: Say) -> Iterator[Scratch]:
    """A directory that goes in the end; when something went wrong its logs stay, and it is said where."""
    here = Scratch(Path(tempfile.mkdtemp(prefix="taichi-")))  # mode 0700
    try:
        yield here
    except asyncio.CancelledError:  # somebody stopped it: nothing went wrong
        raise
    except BaseException:
        here.keep = True
        raise
    finally:
        if here.keep and any(here.path.glob("*.log")):
            for path in here.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.suffix != ".log":
                    path.unlink()
            say(f"logs are kept in {here.path}")
        else:
            shutil.rmtree(here.path, ignore_errors=True)
