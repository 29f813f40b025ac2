"""The live page in a real browser, over a real server: it shows, it acts, and it survives a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Tab, browser, chromium
from conftest import API_KEY
from load import PATH, streamed, wishes
from servers import Server, eventually

from taichi_serve.bench.client import stream
from taichi_serve.bench.sse import Events

needs_browser = pytest.mark.skipif(
    chromium() is None, reason="there is no Chromium here: apt-get install chromium"
)
SLIDERS = {"p_heavy": 1, "d_heavy": 1, "p_chunk": 1024, "d_chunk": 256}
# Long enough that every prompt goes to the P-heavy instance where the TTFT SLO is tight.
WISHES = wishes(12, seed=5, prompt=(600, 1400), output=(60, 120))
LONG = wishes(1, seed=6, prompt=(40, 60), output=(3500, 3500))[0]


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with browser(tmp_path) as tab:
        tab.size(1280, 900)
        yield tab


class Traffic:
    """Requests in a thread of their own, again and again, while a browser is driven."""

    def __init__(self, work: Callable[[], Awaitable[object]]) -> None:
        self._work = work
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def for_ever() -> None:
            while True:
                await self._work()

        self._task = self._loop.create_task(for_ever())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.close()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(60)
        assert not self._thread.is_alive()


async def answered(server: Server) -> None:
    async with server.client() as client:
        await streamed(client, WISHES)


async def long_ones(server: Server) -> None:
    async with server.client() as client:
        await asyncio.gather(*(stream(client, PATH, LONG.body()) for _ in range(2)))


def slid(server: Server, **sliders: int) -> None:
    httpx.patch(f"{server.url}/taichi/sliders", json=sliders, headers=server.headers).raise_for_status()


def live(tab: Tab, server: Server) -> None:
    """The page of a server, and its first update."""
    tab.open(f"{server.url}/")
    assert tab.evaluate("location.pathname") == "/taichi/"
    tab.until("document.querySelector('#link').dataset.link === 'live'", 20)
    tab.until("document.querySelectorAll('[data-instance]').length === 2", 10)


@needs_browser
def test_the_page_loads_and_shows_a_move_as_it_happens(tab: Tab, hybrid: Server) -> None:
    live(tab, hybrid)
    assert tab.complaints == []
    assert "i0" in tab.text("[data-instance=i0]")
    assert tab.evaluate("document.querySelector('[data-instance=i0]').classList.contains('p')")
    slid(hybrid, d_chunk=0)  # every prompt is handed over
    try:
        tab.evaluate(WATCH)
        with Traffic(partial(answered, hybrid)):
            late = tab.until("window.moveShown && window.moveShown()", 60)
        assert late < 1000, f"a move was shown {late} ms after the server told of it"
        tab.until("document.querySelectorAll('#moves button').length > 0", 10)
        assert "hand-over" in tab.text("#moves")
        assert tab.complaints == []
    finally:
        slid(hybrid, **SLIDERS)


# How long (ms) after the update that tells of a move its trace is on the page: both seen by the page itself.
WATCH = """
(() => {
  let told = null, shown = null;
  const count = document.querySelector('[data-count="hand-over"] b');
  const before = Number(count.textContent);
  const answer = fetch('events', {cache: 'no-store'});
  answer.then(async (response) => {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      if (told === null && value.includes('"hops"') && value.includes('hand-over')) {
        told = performance.now();
        reader.cancel();
        return;
      }
    }
  });
  new MutationObserver(() => {
    if (shown === null && document.querySelector('[data-move="hand-over"]')) shown = performance.now();
  }).observe(document.querySelector('#board'), {subtree: true, childList: true});
  window.moveShown = () => told !== null && shown !== null && Math.max(1, shown - told);
})()
"""


@needs_browser
def test_sliders_are_moved_after_a_question_and_their_effect_is_seen(tab: Tab, hybrid: Server) -> None:
    live(tab, hybrid)
    tab.until("document.querySelector('#d_chunk').value === '256'", 10)
    try:
        tab.evaluate(
            "(() => { const input = document.querySelector('#d_chunk'); input.value = 128;"
            " input.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        tab.click_on("#sliders .main")
        tab.until("document.querySelector('#confirm').open", 5)
        assert "256" in tab.text("#confirm-what")
        assert "128" in tab.text("#confirm-what")
        assert hybrid.state()["sliders"]["d_chunk"] == 256  # nothing happens before the answer
        tab.click_on("#confirm .main")
        tab.until("document.querySelector('#sliders-status').textContent.startsWith('in force')", 20)
        assert hybrid.state()["sliders"]["d_chunk"] == 128
        tab.until("document.querySelector('[data-instance=i1]').textContent.includes('chunk 128')", 5)
        tab.until("document.querySelector('#notes').textContent.includes('chunk 128')", 5)
        assert tab.complaints == []
    finally:
        slid(hybrid, **SLIDERS)


@needs_browser
def test_an_instance_is_drained_and_resumed_from_its_row(tab: Tab, hybrid: Server) -> None:
    live(tab, hybrid)
    for deed, draining in (("Drain", True), ("Resume", False)):
        tab.until(f"document.querySelector('[data-row=i0] button')?.textContent === '{deed}'", 10)
        tab.click_on("[data-row=i0] button")
        tab.until("document.querySelector('#confirm').open", 5)
        tab.click_on("#confirm .main")
        eventually(lambda d=draining: hybrid.instance("i0")["draining"] is d, 10, f"draining is {draining}")
    tab.until("!document.querySelector('[data-instance=i0]').classList.contains('drained')", 10)
    assert tab.complaints == []


@needs_browser
def test_a_click_on_a_request_tells_its_story_and_so_does_the_keyboard(tab: Tab, hybrid: Server) -> None:
    live(tab, hybrid)
    with Traffic(partial(long_ones, hybrid)):
        tab.until("document.querySelector('.dot.full') !== null", 60)
        x, y = tab.evaluate(
            "(() => { document.querySelector('#board').scrollIntoView();"
            " const r = document.querySelector('.dot.full').getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        tab.click(x, y)
        tab.until("document.querySelector('#story').open", 5)
        tab.until("document.querySelector('#story-text').textContent.includes('first token from')", 10)
        assert "arrived" in tab.text("#story-text")
        tab.press("Escape")
        tab.until("!document.querySelector('#story').open", 5)
        tab.evaluate("document.querySelector('#board svg').focus()")
        tab.press("ArrowRight")
        tab.until("document.querySelector('#caption').textContent.includes('prompt tokens')", 5)
        tab.press("Enter")
        tab.until("document.querySelector('#story').open", 10)
        buttons = "[...document.querySelectorAll('#story-text button')]"
        move = f"{buttons}.find(b => b.textContent.startsWith('Move to'))"
        tab.until(f"{move} !== undefined", 10)
        tab.evaluate(f"{move}.click()")
        tab.until("document.querySelector('#confirm').open", 5)
        tab.click_on("#confirm .main")
        tab.until("document.querySelector('#story-text').textContent.includes('an operator asked')", 20)
        assert tab.complaints == []


@needs_browser
def test_the_page_asks_for_the_key_and_keeps_it_out_of_the_url(tab: Tab, aggregation: Server) -> None:
    tab.open(f"{aggregation.url}/taichi/")
    tab.until("document.querySelector('#key').open", 20)
    assert not tab.evaluate("document.querySelectorAll('[data-instance]').length")
    tab.type("a wrong one")
    tab.press("Enter")
    tab.until("document.querySelector('#key-wrong').textContent !== ''", 10)
    tab.type(API_KEY)
    tab.press("Enter")
    tab.until("document.querySelectorAll('[data-instance]').length === 2", 20)
    assert API_KEY not in tab.evaluate("location.href")
    assert tab.evaluate("localStorage.length") == 0
    assert all("401" in complaint for complaint in tab.complaints)  # what the browser says of the attempts


@needs_browser
def test_it_fits_a_phone_and_a_wide_screen_in_light_and_dark(tab: Tab, hybrid: Server) -> None:
    live(tab, hybrid)
    tab.check_widths(360, 768, 1280, 1920)


@needs_browser
def test_it_survives_a_restart_of_the_server(tab: Tab, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = Server(tmp_path_factory.mktemp("one"), "--p-heavy", "1", "--d-heavy", "1")
    second = None
    try:
        live(tab, first.wait_ready())
        first.stop()
        tab.until("document.querySelector('#link').dataset.link !== 'live'", 20)
        words = ("--p-heavy", "1", "--d-heavy", "1", "--d-chunk", "192")
        second = Server(tmp_path_factory.mktemp("two"), *words, port=first.port)
        second.wait_ready()
        tab.until("document.querySelector('#link').dataset.link === 'live'", 20)
        tab.until("document.querySelector('[data-instance=i1]').textContent.includes('chunk 192')", 10)
        second.stop()
    finally:
        for server in (first, second):
            if server is not None:
                server.end()


async def test_the_stream_tells_of_a_request_and_the_windows_count_it(hybrid: Server) -> None:
    """Without a browser: what the page lives from."""
    seen: list[dict[str, Any]] = []
    before = hybrid.state()["attainment"]["ten_minutes"]["requests"]
    async with hybrid.client() as client, client.stream("GET", "/taichi/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        asked = asyncio.create_task(streamed(client, WISHES[:3]))
        events = Events()
        assert hybrid.state()["viewers"] == 1
        async for chunk in answer.aiter_raw():
            seen += [json.loads(data) for data in events.feed(chunk)]
            if sum(len(update.get("points", [])) for update in seen[1:]) >= 3:
                break
        await asked
    eventually(lambda: hybrid.state()["viewers"] == 0, 5, "nobody looks any more")
    assert seen[0]["whole"]
    assert [one["name"] for one in seen[0]["instances"]] == ["i0", "i1"]
    assert {row[1] for update in seen for row in update.get("requests", [])} >= {"prefilling", "decoding"}
    assert len([name for update in seen for name in update.get("gone", [])]) >= 3
    after = hybrid.state()["attainment"]
    assert after["ten_minutes"]["requests"] - before == 3
    assert 0 <= after["minute"]["good"] <= 1
    assert all(not instance["draining"] for instance in hybrid.state()["instances"])


def test_top_prints_how_the_server_stands(hybrid: Server, capsys: pytest.CaptureFixture[str]) -> None:
    from taichi_serve.commands.top import main

    assert main(["--url", hybrid.url, "--once"]) == 0
    said = capsys.readouterr().out
    assert "i0" in said and "P-heavy" in said
    assert "last ten minutes" in said
