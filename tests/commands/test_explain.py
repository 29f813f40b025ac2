"""`taichi explain` on the record of a request that was handed over, moved by hand, and drained."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from taichi_serve.commands import explain

RECORDED = (Path(__file__).parent / "request.json").read_bytes()
ID = "cmpl-a0d894f43c7ea013"


class Server(BaseHTTPRequestHandler):
    """Knows one request, and one key."""

    def do_GET(self) -> None:
        """Answer as the real server does."""
        status, body = 404, json.dumps({"error": {"message": "no request 'x' among the last ones"}}).encode()
        if self.headers.get("Authorization") != "Bearer key":
            status, body = (
                401,
                json.dumps({"error": {"message": "The API key is missing or wrong."}}).encode(),
            )
        elif self.path == f"/taichi/requests/{ID}":
            status, body = 200, RECORDED
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_table_has_every_leg_and_every_decision_with_its_reason(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert explain.main([ID, "--url", url, "--api-key", "key"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1 i1 a move 3.730 2 1803 113" in shown
    assert "-> prefill on i0, decode elsewhere none is feasible: the lowest predicted TTFT" in shown
    assert "* i0 TTFT 32806 ms, 0 prompt tokens queued: not feasible" in shown
    assert "-> hand-over to i1 the D-heavy instance with most room" in shown
    assert "-> operator to i0 an operator asked" in shown
    assert "-> drain to i1 i0 is draining" in shown
    assert "23.177 finished 800 tokens out" in shown


def test_what_a_newer_server_adds_is_shown_and_what_it_does_not_know_is_named() -> None:
    record = {
        "arrived_at": 1.0,
        "log": [
            {
                "type": "Flow",
                "to": "i0",
                "move": "degrade",
                "why": "KV",
                "outlooks": [{"instance": "i0", "tpot": 0.02, "load": 0.5, "fits": True}],
            },
            {"type": "Refused", "at": 2.0, "why": "no room"},
        ],
    }
    assert list(explain.lines(record)) == [
        (None, "-> degrade to i0", "KV"),
        (None, "   * i0", "TPOT 20.0 ms, KV 50.0% once it is there"),
        (1.0, "refused", "no room"),
    ]


@pytest.mark.parametrize(
    ("key", "said"), [("key", "no request 'x' among the last ones"), ("wrong", "The API key is missing")]
)
def test_a_refusal_is_one_line_and_exit_status_1(
    url: str, capsys: pytest.CaptureFixture[str], key: str, said: str
) -> None:
    assert explain.main(["x", "--url", url, "--api-key", key]) == 1
    assert said in capsys.readouterr().err


def test_no_server_is_one_line_and_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["x", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer from http://127.0.0.1:1" in capsys.readouterr().err
