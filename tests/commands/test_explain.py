"""`taichi explain` on a request that was handed over, moved by hand, and drained; and on logs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from taichi_serve.commands import explain
from taichi_serve.eventlog import COMMANDS, EVENTS, NO_TIMELINE, Entry, encode, read
from taichi_serve.messages import (
    Command,
    Decline,
    Demote,
    Event,
    Flow,
    Flowed,
    Forecast,
    Move,
    Prefilled,
    Stepped,
    Timeline,
    Tuned,
)
from taichi_serve.sliders import Sliders

GOLDEN = Path(__file__).parents[1] / "golden"
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
        elif self.path in (f"/taichi/requests/{ID}", "/taichi/requests/cmpl-a%2Fb%20c%25%3Fd%23"):
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
            {"type": "Ahead", "to": "i1", "leg": 1, "why": "most room"},
            {"type": "Refused", "at": 2.0, "why": "no room"},
            {"type": "Rebooted", "at": 3.0, "why": "somebody tripped over it"},
        ],
    }
    assert list(explain.lines(record)) == [
        (None, "-> degrade to i0", "KV"),
        (None, "   * i0", "TPOT 20.0 ms, KV 50.0% once it is there"),
        (None, "-> copy its KV ahead to i1", "most room"),
        (1.0, "move refused", "no room"),
        (2.0, "rebooted", "somebody tripped over it"),
    ]


def test_a_log_gives_the_same_as_the_server_that_wrote_it(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text("".join(f"{encode(*entry)}\n" for entry in entries()))
    assert explain.main([ID, "--log", str(log)]) == 0
    logged = capsys.readouterr().out
    assert explain.main([ID, "--url", url, "--api-key", "key"]) == 0
    assert capsys.readouterr().out == logged


def entries() -> Iterator[Entry]:
    """The record as the log that it came from: every fact with what was decided upon it."""
    fact: Event | None = None
    commands: list[Command] = []
    for row in json.loads(RECORDED)["requests"][0]["log"]:
        name = row.pop("type")
        if name not in EVENTS:
            commands.append(msgspec.convert(row, COMMANDS[name]))
            continue
        if fact is not None:
            yield fact, tuple(commands)
        yield Stepped(row["at"], "i0", 0.1, 0, 1, 16), ()  # about nobody
        fact, commands = msgspec.convert(row, EVENTS[name]), []
    assert fact is not None
    yield fact, tuple(commands)


def test_every_instance_that_could_have_been_taken_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    log = GOLDEN / "hybrid.jsonl"
    lines = read(log.read_text().splitlines(keepends=True)[1:])
    flowed = next(c.request for _, commands in lines for c in commands if isinstance(c, Flow))
    assert explain.main([flowed, "--log", str(log)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"request {flowed}\n")
    assert "-> prefill on " in shown
    assert "-> degrade to " in shown
    assert "* i0 " in shown
    assert "TTFT " in shown
    assert "TPOT " in shown


def test_one_picture_is_drawn_of_all_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, picture = moved_once(tmp_path), tmp_path / "new" / "moves.svg"
    assert explain.main(["a", "--log", str(log), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "goes on at i1" in shown
    assert shown.endswith(f"{picture}: 1 move\n")
    assert "<svg" in picture.read_text()


def moved_once(directory: Path) -> Path:
    """A log of one request that moved, one that did not, and one that moved before timelines were kept."""
    times = dict.fromkeys(NO_TIMELINE, 0.0)
    times |= {"left": 1.0, "heard": 1.001, "arrived": 1.002, "scheduled": 1.004, "made": 1.01, "at": 1.011}
    log = directory / "events.jsonl"
    log.write_text(
        "".join(
            f"{encode(*entry)}\n"
            for entry in (
                (Prefilled(1.0, "a", 0, "i0"), (Flow("a", 1, "i1", Move.OPERATOR),)),
                (Flowed(1.011, "a", 1, "i1", 2, 16, 0.01, 16, Timeline(**times)), ()),
                (Prefilled(1.0, "stays", 0, "i0"), ()),
                (Prefilled(1.0, "older", 0, "i0"), ()),
                (Flowed(2.0, "older", 1, "i1", 2, 16, 0.01, 16), ()),
            )
        )
    )
    return log


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("b", "--log", "LOG"), "no request 'b' in LOG"),
        (("a", "--log", "LOG.not"), "LOG.not: No such file or directory"),
        (("a", "--log", "PNG"), "PNG is not an event log: "),
        (("Flow", "--log", "TEXT"), "TEXT is not an event log: line 1: "),
        (("a", "--log", "LOG", "--plot", "moves.pdf"), "--plot moves.pdf: the name must end in .png or .svg"),
        (("a", "--log", "LOG", "--plot", "LOG/moves.png"), "LOG: "),
        (("stays", "--log", "LOG", "--plot", "a.png"), "nothing to draw of stays: it did not move"),
        (("older", "--log", "LOG", "--plot", "a.png"), "nothing to draw of older: no timeline of its moves"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    files = {"LOG": moved_once(tmp_path), "PNG": tmp_path / "a.png", "TEXT": tmp_path / "notes"}
    files["PNG"].write_bytes(b"\x89PNG\r\n\x1a\n")
    files["TEXT"].write_text("Flow flows.\n")
    for name, path in files.items():
        words = tuple(word.replace(name, str(path)) for word in words)
        said = said.replace(name, str(path))
    assert explain.main([*words]) == 2
    out, error = capsys.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert error.startswith(f"explain: {said}")


def test_an_id_may_have_any_character(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["cmpl-a/b c%?d#", "--url", url, "--api-key", "key"]) == 0
    assert ID in capsys.readouterr().out


def test_a_server_that_does_not_know_the_request_says_so_and_the_exit_status_is_2(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main(["x", "--url", url, "--api-key", "key"]) == 2
    assert capsys.readouterr().err == "explain: no request 'x' among the last ones\n"


def test_a_wrong_key_is_one_line_and_exit_status_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["x", "--url", url, "--api-key", "wrong"]) == 1
    assert "The API key is missing" in capsys.readouterr().err


def test_no_server_is_one_line_and_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["x", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer from http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record", [{"id": "a"}, {"id": "a", "arrived_at": 0.0, "legs": [{}], "log": []}, [], 7, {"legs": 7}]
)
def test_a_record_that_cannot_be_read_is_one_line_and_exit_status_2(
    record: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explain, "asked", lambda url, name, key: [record])
    assert explain.main(["a"]) == 2
    assert capsys.readouterr().err.startswith("explain: this version cannot read the record of a: ")


def test_sliders_that_set_themselves_are_told_with_reason_and_predicted_gain() -> None:
    change = Tuned(3.0, Sliders(1, 1, 1024, 192), 0.5, 0.8, "S_D 256 -> 192: TPOT is short", 0.05)
    said = Tuned(4.0, Sliders(1, 1, 1024, 192), 0.5, 0.8, "S_D 256 -> 192: TPOT is short", act=False)
    rows = [{"type": "Tuned", **msgspec.to_builtins(fact)} for fact in (change, said)]
    why = "S_D 256 -> 192: TPOT is short"
    assert list(explain.lines({"arrived_at": 1.0, "log": rows})) == [
        (2.0, "sliders set themselves", f"{why} (+5% good requests predicted)"),
        (3.0, "sliders to be set", why),
    ]


def test_best_effort_and_a_refusal_at_the_door_are_told_with_their_reasons() -> None:
    forecast = Forecast("i0", 4.7, 3700, feasible=False)
    made = [
        Demote("a", 0, 16.0, "the longest before d, which would be late: TTFT 5.2 s of 4 s"),
        Decline("a", 7.36, "TTFT 4.7 s of 4 s, and best effort would wait too long", (forecast,)),
    ]
    rows = [{"type": type(command).__name__, **msgspec.to_builtins(command)} for command in made]
    assert list(explain.lines({"arrived_at": 1.0, "log": rows})) == [
        (None, "-> best effort", "the longest before d, which would be late: TTFT 5.2 s of 4 s"),
        (
            None,
            "-> turned away",
            "TTFT 4.7 s of 4 s, and best effort would wait too long; it may come back after 7.4 s",
        ),
        (None, "     i0", "TTFT 4700 ms, 3700 prompt tokens queued: not feasible"),
    ]


def test_a_request_with_its_own_slo_arrives_with_it_and_an_older_server_says_nothing_of_it():
    entry = {"type": "Arrived", "at": 0.0, "prompt_tokens": 10, "max_tokens": 5, "movable": True}
    own = {"slo": {"ttft": 10.0, "tpot": 0.2}, "slo_class": "batch"}
    for more, said in ((own, "; class batch; SLO 10 s and 200 ms"), ({}, "")):
        ((_, what, why),) = explain.lines({"arrived_at": 0.0, "log": [{**entry, **more}]})
        assert (what, why) == ("arrived", f"10 prompt tokens, at most 5 output{said}")
