"""Times that an engine on another host says become times of the server's host."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs

from taichi_serve.cluster.vllm.server.offset import WINDOW, Offset, arrived

AHEAD = 86_400.0  # seconds that its host has been up longer


def test_the_word_that_was_under_way_for_the_shortest_time_tells_the_difference() -> None:
    offset = Offset()
    for said, heard in ((10.0, 10.5), (11.0, 11.001), (12.0, 12.2)):
        offset.heard(said + AHEAD, heard)
    assert offset.here(AHEAD + 12.0) == pytest.approx(12.001)


def test_no_time_stays_none() -> None:
    assert Offset(seconds=5.0).here(0.0) == 0.0


def test_clocks_that_drift_apart_are_followed() -> None:
    """Its clock goes slower by one part in a thousand: what was true two windows ago is forgotten."""
    offset = Offset()
    for second in range(int(4 * WINDOW)):
        offset.heard(second * 0.999, float(second))
    last = 4 * WINDOW - 1
    assert offset.here(last * 0.999) == pytest.approx(last, abs=0.001 * 2 * WINDOW)


def test_outputs_of_an_engine_have_times_of_the_server() -> None:
    event = EngineCoreEvent(EngineCoreEventType.QUEUED, AHEAD + 1.0)
    outputs = EngineCoreOutputs(outputs=[EngineCoreOutput("r", [1], events=[event])], timestamp=AHEAD + 3.0)
    arrived(outputs, Offset(), 3.0)
    assert (outputs.timestamp, event.timestamp) == pytest.approx((3.0, 1.0))
