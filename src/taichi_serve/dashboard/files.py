"""The page's files, as they lie in the package. They hold no data, so they may be open to everybody."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
INDEX = "index.html"


class File(NamedTuple):
    """Its bytes, and its media type."""

    content: bytes
    type: str


def _read() -> dict[str, File]:
    found = {}
    for path in files("taichi_serve.dashboard").joinpath("static").iterdir():
        suffix = path.name[path.name.rfind(".") :]
        if suffix in TYPES:
            found[path.name] = File(path.read_bytes(), TYPES[suffix])
    return found


FILES = _read()
