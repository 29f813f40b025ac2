"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).parent.parent

# No deadline for one example: how long it takes says more about the machine than about the code.
settings.register_profile("taichi", deadline=None)
settings.load_profile("taichi")


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """Public traces and latency profiles. Without them a test is skipped, but in CI it fails."""
    path = Path(os.environ.get("TAICHI_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        why = f"no shared data at {path}; name the directory in TAICHI_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return path
