"""The files of each way to run it, read."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
INSTALL = DEPLOY / "container" / "install.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DRAINED = 1.0  # seconds that the rest has to leave after --shutdown-timeout
HOME = "/var/lib/taichi"


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def seconds(text: str) -> float:
    """Of "120s"."""
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None, text
    return float(found[1])


def value(words: list[str], flag: str) -> str:
    """Of `--flag=value`."""
    (found,) = (word.partition("=")[2] for word in words if word.startswith(f"{flag}="))
    return found


def image() -> list[tuple[str, str]]:
    """The instructions of the container file: (name, the rest in one line)."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", read("container/Dockerfile"), flags=re.MULTILINE))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


def said(name: str) -> list[str]:
    return [rest for instruction, rest in image() if instruction == name]


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(read(f"compose/{name}"))
    return found


def unit() -> dict[str, dict[str, list[str]]]:
    """The systemd unit: values by section and key."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in read("systemd/taichi.service").splitlines():
        if re.fullmatch(r"\[\w+\]", line):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            key, equals, rest = line.partition("=")
            assert section and equals, line
            found[section][key].append(rest)
    return found


def manifests() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(read("kubernetes/taichi.yaml"))}


def pod() -> dict[str, Any]:
    found: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    assert isinstance(found, dict)
    return found


def probed() -> dict[str, str]:
    """The path that each probe of the pod asks."""
    names = ("startup", "readiness", "liveness")
    return {name: container()[f"{name}Probe"]["httpGet"]["path"] for name in names}
