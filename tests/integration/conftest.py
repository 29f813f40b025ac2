"""The servers that the integration tests share. All of a run are started side by side, once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from documents import TOOLS
from servers import Server

API_KEY = "an-api-key-of-the-tests"

# The others move KV by the short way between processes of one host.
OVER_NIXL = ("--kv-over", "nixl")

# Four ways to set the sliders. The reference for all comparisons is `single`: one instance, no moves.
SHARED: dict[str, tuple[str, ...]] = {
    "hybrid": ("--p-heavy", "1", "--d-heavy", "1", *TOOLS),
    # On one core, as every instance of the others: two threads that wait for each other suffer when busy.
    "single": ("--d-heavy", "1", "--devices", str(max(os.sched_getaffinity(0))), *TOOLS),
    "aggregation": ("--d-heavy", "2", "--d-chunk", "256"),
    "disaggregation": (
        *("--p-heavy", "1", "--d-heavy", "1", "--d-chunk", "0", "--watermark", "1", *OVER_NIXL, *TOOLS),
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "integration":
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """The servers that the tests of this run ask for, starting."""
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    servers = {
        name: Server(
            tmp_path_factory.mktemp(name), *flags, api_key=API_KEY if name == "aggregation" else None
        )
        for name, flags in SHARED.items()
        if name in wanted
    }
    try:
        yield servers
        with contextlib.ExitStack() as stack:  # all are asked to stop, whichever complains
            for server in servers.values():
                stack.callback(server.stop)
    finally:
        for server in servers.values():
            server.end()


@pytest.fixture(scope="session")
def hybrid(fleet: dict[str, Server]) -> Server:
    """i0 P-heavy with chunk 1024, i1 D-heavy with chunk 256."""
    return fleet["hybrid"].wait_ready()


@pytest.fixture(scope="session")
def single(fleet: dict[str, Server]) -> Server:
    """One instance, from which nothing can move."""
    return fleet["single"].wait_ready()


@pytest.fixture(scope="session")
def aggregation(fleet: dict[str, Server]) -> Server:
    """Two D-heavy instances with one chunk, behind an API key."""
    return fleet["aggregation"].wait_ready()


@pytest.fixture(scope="session")
def disaggregation(fleet: dict[str, Server]) -> Server:
    """i0 does every prefill, i1 every decode; KV goes over NIXL."""
    return fleet["disaggregation"].wait_ready()
