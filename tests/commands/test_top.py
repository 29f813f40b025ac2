"""`taichi top`: updates put together, as tables; and what it says where there is no server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest
from rich.console import Console

from taichi_serve.commands.picture import Picture, render
from taichi_serve.commands.top import main
from taichi_serve.dashboard.rows import Glance, Hop, Live, Note, Standing, Update


def glance(name: str, kind: str, **more: Any) -> Glance:
    known: dict[str, Any] = {
        "name": name, "kind": kind, "chunk": 1024, "standing": "up", "alive": True, "silent": False,
        "draining": False, "restarts": 0, "back_in": 0.0, "lost": None, "running": 3, "waiting": 1,
        "decodes": 3, "arriving": 0, "queued_prefill_tokens": 700, "kv_tokens": 250, "kv_capacity": 1000,
        "ticks": 10, "steps": 10, "prefill_tokens": 0, "output_tokens": 0,
    }  # fmt: skip
    return Glance(**{**known, **more})


STANDING = Standing(
    ttft=2.0,
    tpot=0.15,
    p_heavy=1,
    d_heavy=1,
    p_chunk=1024,
    d_chunk=64,
    max_chunk=4096,
    watermark=0.95,
    autotune="off",
    accepted=7,
    live=1,
    moves={"hand-over": 5, "fetch": 0},
    windows={"minute": (4, 0.75, 1.0, 0.75), "ten_minutes": (0, None, None, None)},
    history=[(0, 0)] * 60,
)
ROW = Live("cmpl-a-0-7f", "decoding", "i1", None, None, 100, 50, 1, 0, 0.0, 0.5)
WHOLE = Update(
    at=10.0,
    whole=True,
    standing=STANDING,
    instances=[glance("i0", "P-heavy"), glance("i1", "D-heavy", alive=False, back_in=12.0)],
    requests=[ROW],
    notes=[Note(9.0, "i1 was lost: killed by SIGKILL", "bad")],
)


def drawn(seen: Picture) -> str:
    console = Console(width=110, color_system=None)
    with console.capture() as captured:
        console.print(render(seen, "http://here"))
    return captured.get()


def test_what_is_shown_is_what_was_told() -> None:
    seen = Picture()
    seen.apply(WHOLE)
    seen.apply(Update(at=11.0, hops=[Hop(10.5, "cmpl-a-0-7f", "hand-over", "i0", "i1", 100, 0.012)]))
    text = drawn(seen)
    assert "1 live, 7 in all" in text
    assert "25%" in text
    assert "back in 12 s" in text
    assert "i1 was lost: killed by SIGKILL" in text
    assert "75.0%" in text and "100.0%" in text
    assert "hand-over 5" in text
    assert "i0 > i1" in text and "gap 12 ms" in text


def test_rates_are_over_a_second_or_more() -> None:
    seen = Picture()
    seen.apply(Update(at=10.0, whole=True, instances=[glance("i0", "P-heavy")]))
    assert seen.rates(seen.instances["i0"]) == (0.0, 0.0)
    seen.apply(Update(at=10.5, instances=[glance("i0", "P-heavy", prefill_tokens=900, output_tokens=9)]))
    assert seen.rates(seen.instances["i0"]) == (0.0, 0.0)
    seen.apply(Update(at=12.0, instances=[glance("i0", "P-heavy", prefill_tokens=2000, output_tokens=20)]))
    assert seen.rates(seen.instances["i0"]) == (1000.0, 10.0)


def test_requests_come_and_go_and_a_snapshot_begins_anew() -> None:
    seen = Picture()
    seen.apply(WHOLE)
    seen.apply(Update(at=11.0, gone=["cmpl-a-0-7f"]))
    assert not seen.requests
    seen.apply(Update(at=1.0, whole=True, instances=[glance("i0", "D-heavy")]))
    assert list(seen.instances) == ["i0"]
    assert not seen.notes


class Stream(BaseHTTPRequestHandler):
    """Says everything once, to whoever has the key."""

    def do_GET(self) -> None:
        """As the real server does."""
        known = self.headers.get("Authorization") == "Bearer key"
        self.send_response(200 if known else 401)
        self.end_headers()
        if known:
            self.wfile.write(b": nothing new\n\ndata: " + msgspec.json.encode(WHOLE) + b"\n\n")
        else:
            self.wfile.write(b'{"error": {"message": "The API key is missing or wrong."}}')

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Stream)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_once_prints_how_it_stands(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", url, "--api-key", "key", "--once"]) == 0
    assert "P-heavy" in capsys.readouterr().out


def test_a_wrong_key_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", url, "--api-key", "no", "--once"]) == 1
    assert capsys.readouterr().err == f"taichi top: {url}/taichi/events: The API key is missing or wrong.\n"


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--once"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("taichi top: no answer from http://127.0.0.1:9: ")
    assert said.count("\n") == 1
