"""The log survives the disk, and every golden log is decided today as it was then."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from taichi_serve.cluster.base import Recorded, drive
from taichi_serve.eventlog import LogError, Logged, decode, encode, read, replay
from taichi_serve.latency.model import Roofline
from taichi_serve.latency.predict import Learned
from taichi_serve.latency.profile import Transfer
from taichi_serve.latency.profiled import Profiled
from taichi_serve.messages import (
    Abort,
    Arrived,
    Cached,
    Finished,
    Flow,
    Flowed,
    Forecast,
    Hopeless,
    Joined,
    Lost,
    Move,
    Outcome,
    Outlook,
    Prefill,
    SetChunk,
    Silent,
    Slid,
    Stepped,
    Tier,
)
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.jsonl"))


def golden_scheduler(head: dict[str, object]) -> GlobalScheduler:
    """The scheduler that the first line of a golden file describes."""
    sliders, policy, capacity = head["sliders"], head["policy"], head["capacity"]
    assert isinstance(sliders, dict)
    assert isinstance(policy, dict)
    assert isinstance(capacity, int)
    built = Sliders(**sliders)
    model = Roofline(launch=0.01, token=1e-4, attention=1e-9, decode=1e-4, kv=1e-7, knee=64)
    links = {(a, b): Transfer(a, b, 0.01, 1e9) for a in Kind for b in Kind}
    predictor = Profiled(model, links, 1_000) if head["predictor"] == "profiled" else Learned()
    capacities = {f"i{n}": capacity for n in range(built.instances)}
    return GlobalScheduler(built, SLO(0.4, 0.03), predictor, Policy(**policy), capacities)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_log_is_decided_as_it_was(path: Path) -> None:
    head, *lines = path.read_text().splitlines(keepends=True)
    different = list(replay(golden_scheduler(json.loads(head)), read(lines)))
    assert different == []


def test_there_are_golden_logs_of_every_mode() -> None:
    assert {p.stem for p in GOLDEN} >= {
        "aggregation",
        "disaggregation",
        "hybrid",
        "bad_day",
        "comes_back",
    }


@pytest.mark.parametrize(
    "entry",
    [
        (
            Arrived(0.5, "a", 10, 20, movable=False),
            (Prefill("a", 0, "i1", True, (Forecast("i1", 1.0, 5, True),), "least queued"),),
        ),
        (Stepped(1.0, "i0", 0.02, 5, 3, 900, 1, ("a", "b")), ()),
        (
            Flowed(1.0, "a", 2, "i1", 17, 300, 0.03),
            (Flow("b", 1, "i0", Move.DEGRADE, "full", (Outlook("i0", 0.1, 0.5, True),)),),
        ),
        (Slid(1.0, Sliders(1, 1, 64, 0)), (SetChunk("i1", Kind.D_HEAVY, 0),)),
        (Lost(2.0, "i0", "killed"), ()),
        (Silent(2.0, "i0"), (Prefill("a", 1, "i1"),)),
        (Silent(2.5, "i0", on=False), ()),
        (Joined(3.0, "i0", 9_000), (SetChunk("i0", Kind.P_HEAVY, 64),)),
        (
            Arrived(0.5, "a", 40, 20, blocks=(2**64 - 1, 7)),
            (Prefill("a", 0, "i1", prefix_from="i0", prefix_tokens=32),),
        ),
        (Cached(1.0, "i0", (1, 2**64 - 1), (3,), reset=True, tier=Tier.HOST), ()),
        (Arrived(0.5, "a", 40, 20, slo=SLO(9.0, 0.5), slo_class="batch"), ()),
        (Hopeless(4.0, "it died five times"), (Abort("a", Outcome.FAILED, "it died five times"),)),
    ],
)  # fmt: skip
def test_entry_survives_a_line(entry: tuple[object, ...]) -> None:
    event, commands = entry
    assert decode(encode(event, commands)) == entry  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"on": ["Arrivd", {}], "do": []}', "Arrivd"),
        ('{"on": ["Finished", {"at": 1, "request": "a"}], "do": []}', "output_tokens"),
        ('{"on": ["Lost", {"at": 1, "instance": "i0", "why": "", "so": 1}], "do": []}', "no field 'so'"),
        ('{"on": ["Finished", {"at": "now", "request": "a", "output_tokens": 1}], "do": []}', "at"),
        ("[]", "dict|object"),
    ],
)
def test_line_that_does_not_fit_is_an_error_with_its_number(line: str, says: str) -> None:
    good = encode(Finished(0.0, "a", 1), [])
    with pytest.raises(LogError, match=f"^line 2: .*({says})"):
        list(read([good + "\n", line + "\n"]))


def test_torn_last_line_ends_the_log() -> None:
    good = encode(Finished(0.0, "a", 1), [])
    assert len(list(read([good + "\n", good[:-5]]))) == 1
    with pytest.raises(LogError, match="line 1"):
        list(read([good[:-5], good]))


async def test_logged_scheduler_writes_what_it_decides_and_replays_to_the_same() -> None:
    head = {"sliders": {"p_heavy": 1, "d_heavy": 1, "p_chunk": 512, "d_chunk": 64}, "policy": {}}
    head |= {"capacity": 5_000, "predictor": "learned"}
    out = io.StringIO()
    cluster = Recorded([Arrived(0.0, "a", 100, 5), Finished(1.0, "a", 5)])
    await drive(Logged(golden_scheduler(head), out), cluster)
    entries = list(read(out.getvalue().splitlines(keepends=True)))
    assert [c for _, commands in entries for c in commands] == cluster.sent
    assert list(replay(golden_scheduler(head), entries)) == []
    other = golden_scheduler(head | {"sliders": {"p_heavy": 2, "d_heavy": 0, "p_chunk": 512, "d_chunk": 0}})
    assert [number for number, _, _ in replay(other, entries)] == [1]


def test_only_the_lines_about_one_request_are_looked_at_and_still_counted() -> None:
    lines = [encode(Finished(0.0, name, 1), []) + "\n" for name in ("a", 'b"', "c")]
    torn = ["{\n", *lines]
    assert [event for event, _ in read(torn, 'b"')] == [Finished(0.0, 'b"', 1)]
    with pytest.raises(LogError, match=r"^line 2: "):
        list(read([lines[0], "{ 'a' \n"], "a"))


def test_a_log_of_an_older_server_may_or_may_not_say_what_binds_a_request() -> None:
    line = '{"on": ["Arrived", {"at": 1.0, "request": "a", "prompt_tokens": 3, "max_tokens": 4%s}], "do": []}'
    said = [decode(line % rest)[0] for rest in ("", ', "movable": false, "bound_by": "seed"')]
    assert said == [Arrived(1.0, "a", 3, 4), Arrived(1.0, "a", 3, 4, movable=False, bound_by="seed")]


def test_a_move_that_an_older_server_logged_has_zero_for_the_parts_it_did_not_know() -> None:
    line = (
        '{"on": ["Flowed", {"at": 2.0, "request": "a", "leg": 1, "instance": "i1", "output_tokens": 2,'
        ' "kv_tokens": 9, "gap": 0.5, "timeline": {"heard": 1.5, "at": 2.0}}], "do": []}'
    )
    event, _ = decode(line)
    assert isinstance(event, Flowed)
    assert event.timeline is not None
    assert (event.timeline.heard, event.timeline.scheduled, event.timeline.at) == (1.5, 0.0, 2.0)
