"""Files that are to be written: whether that will do, before hours of work and not after them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console


def unwritable(path: Path) -> str | None:
    """Why this file cannot be written, in one line; None where it can."""
    if path.is_dir():
        return f"{path}: is a directory"
    if not path.parent.is_dir():
        return f"{path}: there is no directory {path.parent}"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"{path}: cannot be written: Permission denied"
    return None


def made(folder: Path) -> Path:
    """The folder, made where it is not there; ValueError says in one line why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise ValueError(f"{folder}: cannot be made: {wrong.strerror}") from None
    return folder


def say_written(paths: Iterable[Path], console: Console) -> None:
    """Name every file that was written, a line for each."""
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, markup=False, highlight=False)
