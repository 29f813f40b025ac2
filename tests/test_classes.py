"""Classes of requests, as they stand in a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from taichi_serve.classes import SLOClass, classes_of, plain, read_classes
from taichi_serve.slo import SLO

SERVERS = SLO(4.0, 0.07)
TEXT = """
interactive:
  ttft_slo: 1
  tpot_slo: 0.04
  keys: [sk-app]
batch:
  ttft_slo: 10
  ttft_bounds: [5, 600]
  weight: 0.5
  refuse: false
"""


def test_classes_are_read_from_yaml_and_from_json(tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(TEXT, encoding="utf-8")
    found = read_classes(str(file))
    assert found == {
        "interactive": SLOClass("interactive", 1.0, 0.04, keys=("sk-app",)),
        "batch": SLOClass("batch", 10.0, ttft_bounds=(5.0, 600.0), weight=0.5, refuse=False),
    }
    assert read_classes('{"a": {"tpot_slo": 0.1}}') == {"a": SLOClass("a", tpot_slo=0.1)}


def test_classes_become_plain_objects_that_are_read_as_the_same() -> None:
    text = (
        '{"a": {"ttft_slo": 1, "ttft_bounds": [0.5, 2], "keys": ["k"], "demote": false}, '
        '"default": {"tpot_bounds": [1, Infinity]}}'
    )
    found = read_classes(text)
    written = plain(found)
    assert written["a"] == {"ttft_slo": 1.0, "ttft_bounds": [0.5, 2.0], "demote": False, "keys": ["k"]}
    assert classes_of(yaml.safe_load(yaml.safe_dump(written))) == found


def test_what_a_class_leaves_open_is_the_servers_and_what_is_asked_for_comes_first() -> None:
    batch = SLOClass("batch", ttft_slo=10.0)
    assert batch.slo(SERVERS) == SLO(10.0, 0.07)
    assert batch.slo(SERVERS, ttft=20.0, tpot=0.5) == SLO(20.0, 0.5)
    assert SLOClass("plain").slo(SERVERS) is None


def test_bounds_are_for_what_is_asked() -> None:
    batch = SLOClass("batch", ttft_bounds=(5.0, 600.0), tpot_bounds=(0.1, float("inf")))
    assert batch.beyond("ttft", None) is None
    assert batch.beyond("ttft", 5.0) is None
    assert batch.beyond("ttft", 4.0) == "4000 ms is not within the bounds of class batch, 5000 to 600000 ms"
    assert batch.beyond("tpot", 0.05) == "50 ms is not within the bounds of class batch, at least 100 ms"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no JSON"),
        ("{}", "classes are an object"),
        ('{"a": 3}', "class a: expected an object"),
        ('{"a": {"tpot": 1}}', "class a: 'tpot' is none of ttft_slo, tpot_slo"),
        ('{"a": {"ttft_slo": 0}}', "class a: ttft_slo must be a positive number"),
        ('{"a": {"ttft_slo": "1"}}', "class a: ttft_slo must be a number, not '1'"),
        ('{"a": {"refuse": 1}}', "class a: refuse must be true or false"),
        ('{"a": {"keys": "sk"}}', "class a: keys must be a list of texts"),
        ('{"a": {"ttft_bounds": [5]}}', "class a: ttft_bounds must be two numbers"),
        ('{"a": {"ttft_bounds": [5, 1]}}', "class a: ttft_bounds must be the least and the most"),
        ('{"a": {"ttft_slo": 9, "ttft_bounds": [1, 5]}}', "class a: ttft_slo 9 is outside of"),
        ('{"default": {"ttft_slo": 9}}', "class default: its SLO is that of the server"),
        ('{"a": {"keys": ["k"]}, "b": {"keys": ["k"]}}', "class b: one of its keys is a key of class a"),
        ('{"a\\n": {}}', "a name of 1 to 64 printable"),
    ],
)  # fmt: skip
def test_a_wrong_class_is_named_with_its_field(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^") as wrong:
        read_classes(text)
    assert says in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.yaml: No such file"):
        read_classes(str(tmp_path / "gone.yaml"))


def test_keys_are_in_no_repr() -> None:
    assert "sk-app" not in repr(SLOClass("a", keys=("sk-app",)))
