"""The shape of the code: what is too long has a name missing. The exceptions are named here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "taichi_serve"
FILE_LINES, FUNCTION_LINES = 300, 45
# An alphabet of many scripts, and a vocabulary: both are data.
LONG_FILES = {"tiny.py", "messages.py"}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(SOURCE)}:{node.name}", node.end_lineno - node.lineno + 1


def test_no_file_is_longer_than_a_noun() -> None:
    lengths = {str(p.relative_to(SOURCE)): len(p.read_text().splitlines()) for p in SOURCE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > FILE_LINES and name not in LONG_FILES} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    found = {name: n for path in SOURCE.rglob("*.py") for name, n in functions(path)}
    assert {name: n for name, n in found.items() if n > FUNCTION_LINES} == {}
