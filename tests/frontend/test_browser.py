"""The page in a real browser over pretended engines: what needs no model, and has every kind of move.

Over real engines it is tested in integration/test_page.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import Tab, browser, chromium
from servers import eventually

from taichi_serve.ports import port_of, reserve

ROOT = Path(__file__).parents[2]
# Its KV is short: long outputs are degraded, and some flow back. i1 is lost twenty seconds after the start.
WORDS = "--p-heavy 1 --d-heavy 2 --rate 9 --kv 30000 --ahead 40 --tpot-slo 0.04 --ttft-slo 1 --lose 20"

pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium here: apt-get install chromium"),
    pytest.mark.long,
    pytest.mark.timeout(300),
]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/taichi/", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with reserve() as held:
        port = port_of(held)
        command = [sys.executable, str(ROOT / "benchmarks" / "pretended_server.py"), *WORDS.split()]
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdin=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: answers(f"http://127.0.0.1:{port}"), 120, "the pretended server answers")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def tab(tmp_path: Path, url: str) -> Iterator[Tab]:
    with browser(tmp_path) as tab:
        tab.size(1280, 900)
        tab.open(f"{url}/")
        tab.until("document.querySelectorAll('[data-instance]').length === 3", 30)
        yield tab
        assert tab.complaints == []


def test_it_draws_every_request_its_moves_and_a_loss(tab: Tab) -> None:
    tab.until("document.querySelectorAll('.dot').length > 10", 20)
    tab.until("document.querySelector('[data-move=\"hand-over\"]') !== null", 30)
    tab.until("document.querySelectorAll('#scatter circle').length > 50", 10)
    tab.until("document.querySelector('[data-share=\"both minute\"]').textContent.endsWith('%')", 10)
    tab.until("document.querySelector('#notes').textContent.includes('i1 was lost')", 60)
    tab.until("document.querySelector('#notes').textContent.includes('i1 serves again')", 60)


def test_a_story_is_told_by_the_keyboard_and_closed_again(tab: Tab) -> None:
    tab.until("document.querySelector('.dot.full') !== null", 20)
    tab.evaluate("document.querySelector('#board svg').focus()")
    tab.press("ArrowRight")
    tab.until("document.querySelector('#caption').textContent.includes('prompt tokens')", 5)
    tab.press("Enter")
    tab.until("document.querySelector('#story').open", 5)
    tab.until("document.querySelector('#story-text').textContent.includes('arrived')", 10)
    tab.press("Escape")
    tab.until("!document.querySelector('#story').open", 5)


def test_whoever_wants_less_motion_sees_moves_without_flights(tab: Tab) -> None:
    tab.prefer(motion="reduce")
    tab.until("document.querySelector('[data-move]') !== null", 30)
    assert tab.evaluate("document.querySelectorAll('.air .dot').length") == 0


def test_it_fits_every_width_in_light_and_dark(tab: Tab) -> None:
    tab.check_widths(360, 768, 1080, 1920)


def test_a_question_that_is_answered_with_no_changes_nothing(tab: Tab) -> None:
    tab.until("document.querySelector('#d_chunk').value === '256'", 10)
    tab.evaluate(
        "(() => { const input = document.querySelector('#d_chunk'); input.value = 64;"
        " input.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    tab.click_on("#sliders .main")
    tab.until("document.querySelector('#confirm').open", 5)
    tab.press("Escape")
    tab.until("!document.querySelector('#confirm').open", 5)
    tab.click_on("#sliders button[type=button]")  # Reset
    tab.until("document.querySelector('#d_chunk').value === '256'", 5)
    assert "chunk 256" in tab.text("[data-instance=i1]")
