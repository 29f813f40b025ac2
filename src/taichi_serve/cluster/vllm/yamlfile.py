"""A file of settings in YAML, as plain values. What YAML lets pass in silence, or fails at in its own ways,
is an error with words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST = 100_000  # values; a few lines of references can stand for more than there is memory


class _Loader(yaml.SafeLoader):
    """YAML takes the last of two values with one name."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(f"{key.value!r} is there twice, the second time in line {_line(key)}")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as wrong:
            if isinstance(wrong, ValueError) and str(wrong).startswith("line "):
                raise  # of a value inside this one
            raise ValueError(f"line {_line(node)}: {str(node.value)[:80]!r} is no value: {wrong}") from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def read(path: str) -> dict[str, Any]:
    """The settings of a file, by their names as they stand there; raises ValueError, OSError, YAMLError."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = yaml.load(text, _Loader)  # noqa: S506  it is a safe one
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("the file must hold keys with values")
    for key, value in found.items():
        if _more_than(MOST, value):
            raise ValueError(f"{key}: more than {MOST} values, or one that holds itself")
    return {str(key): value for key, value in found.items()}


def _more_than(most: int, value: Any) -> bool:
    open_ones, count = [value], 0
    while open_ones and count <= most:
        one, count = open_ones.pop(), count + 1
        if isinstance(one, dict):
            open_ones += [part for pair in one.items() for part in pair]
        elif isinstance(one, list | tuple | set):
            open_ones += one
    return count > most
