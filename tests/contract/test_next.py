"""The contract with the vLLM that comes next, where its sources are: `scripts/contract.py` gets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEXT = "0.33.0"
SOURCES = ROOT / "build" / f"vllm-{NEXT}"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not SOURCES.is_dir(), reason=f"no sources of vLLM {NEXT}: python scripts/contract.py {NEXT}"
)
def test_the_contract_holds_with_the_sources_of_the_next_version() -> None:
    words = [sys.executable, "scripts/contract.py", NEXT, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
