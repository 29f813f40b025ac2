"""The script of the image in a fresh Debian root: what it leaves serves. Needs root, a network and this:

debootstrap --variant=minbase bookworm ROOT
mount --rbind /dev ROOT/dev && mount --bind /proc ROOT/proc && cp /etc/resolv.conf ROOT/etc
TAICHI_DEBIAN_ROOT=ROOT pytest tests/deploy/test_fresh_root.py --timeout=3600
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHERE = os.environ.get("TAICHI_DEBIAN_ROOT")
# As the container file copies.
PARTS = ("deploy/container/install.sh", "pyproject.toml", "LICENSE", "README.md", "src")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(WHERE is None, reason="TAICHI_DEBIAN_ROOT names no fresh Debian root"),
]


def inside(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, with an environment as bare as the root is."""
    bare = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    command = ["chroot", str(WHERE), *words]
    return subprocess.run(command, env=bare, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed() -> str:
    """What the script said at its end; the parts of the checkout are in the root meanwhile."""
    source = Path(str(WHERE)) / "tmp" / "taichi"
    source.mkdir(parents=True)
    try:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, source / Path(part).name)
        ended = inside("/tmp/taichi/install.sh", "cpu", "/tmp/taichi")
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    finally:
        shutil.rmtree(source)
    return ended.stdout.splitlines()[-1]


def test_the_script_ends_with_the_versions_that_it_installed(installed: str) -> None:
    assert installed.startswith("taichi-serve ")
    assert "vLLM for CPUs 0.32.0" in installed


def test_the_demo_runs_there(installed: str) -> None:
    ended = inside("/opt/taichi/bin/taichi-serve", "demo")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert "40 of 40" in ended.stdout


def test_both_names_of_the_command_are_there(installed: str) -> None:
    told = {inside(f"/opt/taichi/bin/{name}", "--version").stdout for name in ("taichi", "taichi-serve")}
    assert told == {f"{installed}\n"}
