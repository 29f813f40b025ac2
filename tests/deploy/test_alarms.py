"""Each alarm fires for what it is about, over what the collector really gives, and is silent otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("prometheus_client")  # it comes with vLLM

from history import History
from known import ours, prometheus, vllms_here
from promql import Known, parsed
from scraping import system
from sources import ALERTS

from taichi_serve.cluster.vllm.server.elastic import Change
from taichi_serve.messages import Move, Outcome
from taichi_serve.scheduling.counters import Attained, Kept

FIRST, LAST = 5.0, 600.0  # seconds; every window reaches back to the first scrape
Happens = Callable[[Any, History], None]


@pytest.fixture(scope="module")
def known() -> dict[str, Known]:
    return prometheus() | ours() | vllms_here()


def served(here: Any, good: int, bad: int = 0) -> None:
    """So many requests met both SLOs, and so many did not."""
    here.scheduler.counters.attained["default"] = Attained(both=Kept(good, bad))
    here.recorder.accepted += good + bad
    here.recorder.outcomes[Outcome.FINISHED] += good + bad


def predicted(here: Any, name: str, seconds: float, actual: float, times: int) -> None:
    for _ in range(times):
        here.scheduler.accuracy[name].tpot.add(predicted=seconds, actual=actual)


def ordinary(here: Any) -> None:
    """Ten minutes of a server that does well: all that is counted moves, and no alarm is about it."""
    served(here, good=97, bad=3)
    here.recorder.moves[Move.HAND_OVER] += 60
    here.recorder.moves[Move.BACKFLOW] += 3
    here.recorder.recomputes += 1
    for name in ("i0", "i1"):
        predicted(here, name, 0.05, 0.06, times=40)
    for ended in range(100):
        here.scheduler.counters.ended(Outcome.FINISHED, backflows=ended % 33 == 0)


def kv(history: History, usage: float, preemptions: float) -> None:
    labels = {"engine": "1", "model_name": "a"}
    history.add(LAST, "vllm:kv_cache_usage_perc", usage, labels)
    history.add(LAST, "vllm:num_preemptions_total", preemptions, labels)


def firing(change: Happens | None, known: dict[str, Known]) -> dict[str, list[dict[str, str]]]:
    """The alarms after ten minutes in which this happened besides, with the labels of each."""
    here, history = system(), History()
    served(here, 0)
    history.scrape(FIRST, here)
    history.add(FIRST, "vllm:num_preemptions_total", 0, {"engine": "1", "model_name": "a"})
    ordinary(here)
    history.add(LAST, "up", 1.0)
    kv(history, usage=0.96, preemptions=3)
    if change is not None:
        change(here, history)
    history.scrape(LAST, here)
    found = {rule["alert"]: history.gives(parsed(rule["expr"], known).tree, LAST) for rule in ALERTS}
    return {name: [dict(labels) for labels in vector] for name, vector in found.items() if vector}


def down(here: Any, history: History) -> None:
    history.add(LAST, "up", 0.0)


def trouble(here: Any, history: History) -> None:
    here.recorder.trouble.note("event log", "no space left")


def failed(here: Any, history: History) -> None:
    here.recorder.outcomes[Outcome.FAILED] += 2


def missed(here: Any, history: History) -> None:
    served(here, good=80, bad=20)


def lost_slos(here: Any, history: History) -> None:
    served(here, good=40, bad=60)


def refused(here: Any, history: History) -> None:
    here.recorder.accepted += 10
    here.recorder.outcomes[Outcome.REFUSED] += 10


def dead(here: Any, history: History) -> None:
    here.scheduler.instances["i1"].alive = False


def all_dead(here: Any, history: History) -> None:
    for instance in here.scheduler.instances.values():
        instance.alive = False


def out(here: Any, history: History) -> None:
    supervisor = here.keeper.supervisor
    supervisor.lost("i1", "killed", 10.0)
    supervisor.starting("i1", 10.0)
    supervisor.lost("i1", "killed", 20.0)  # one start an hour is all it may have
    here.scheduler.instances["i1"].alive = False


def silent(here: Any, history: History) -> None:
    here.keeper.silent.add(here.cluster.engines[1])


def restarts(here: Any, history: History) -> None:
    here.keeper.supervisor.places["i1"].restarts += 3


def not_added(here: Any, history: History) -> None:
    here.elastic.counts[Change.FAILED] += 1


def front_ends(here: Any, serves: bool, restarts: int) -> None:
    one = {"name": "f1", "serves": serves, "requests": 0, "restarts": restarts}
    here.front.processes = lambda: [one]


def front_end_down(here: Any, history: History) -> None:
    front_ends(here, serves=False, restarts=0)


def front_end_restarts(here: Any, history: History) -> None:
    front_ends(here, serves=True, restarts=0)
    history.scrape(FIRST, here)
    front_ends(here, serves=True, restarts=3)


def recomputed(here: Any, history: History) -> None:
    here.recorder.recomputes += 9


def backflows(here: Any, history: History) -> None:
    for _ in range(20):
        here.scheduler.counters.ended(Outcome.FINISHED, backflows=1)


def mistaken(here: Any, history: History) -> None:
    predicted(here, "i1", 0.05, 0.25, times=40)


def full(here: Any, history: History) -> None:
    kv(history, usage=0.99, preemptions=3)


def preempted(here: Any, history: History) -> None:
    kv(history, usage=0.96, preemptions=100)


HAPPENED: dict[str, tuple[Happens, set[str]]] = {
    "TaichiServerDown": (down, set()),
    "TaichiTrouble": (trouble, set()),
    "TaichiRequestsFail": (failed, set()),
    "TaichiAttainmentLow": (missed, set()),
    "TaichiAttainmentLost": (lost_slos, {"TaichiAttainmentLow"}),
    "TaichiRequestsRefused": (refused, set()),
    "TaichiNobodyLives": (all_dead, {"TaichiInstanceLost"}),
    "TaichiInstanceLost": (dead, set()),
    "TaichiInstanceOut": (out, {"TaichiInstanceLost"}),
    "TaichiInstanceSilent": (silent, set()),
    "TaichiInstanceRestarts": (restarts, set()),
    "TaichiInstanceNotAdded": (not_added, set()),
    "TaichiFrontEndDown": (front_end_down, set()),
    "TaichiFrontEndRestarts": (front_end_restarts, set()),
    "TaichiMovesRecomputed": (recomputed, set()),
    "TaichiSlidersWrong": (backflows, set()),
    "TaichiPredictionsOff": (mistaken, set()),
    "TaichiKVFull": (full, set()),
    "TaichiPreemptions": (preempted, set()),
}


def test_every_alarm_has_something_that_happens() -> None:
    assert set(HAPPENED) == {rule["alert"] for rule in ALERTS}


def test_an_ordinary_server_raises_no_alarm(known: dict[str, Known]) -> None:
    assert firing(None, known) == {}


@pytest.mark.parametrize("alarm", HAPPENED)
def test_an_alarm_fires_for_what_it_is_about_and_no_other_does(alarm: str, known: dict[str, Known]) -> None:
    change, also = HAPPENED[alarm]
    assert set(firing(change, known)) == {alarm, *also}


@pytest.mark.parametrize("alarm", ["TaichiInstanceLost", "TaichiInstanceSilent", "TaichiPredictionsOff"])
def test_an_alarm_of_an_instance_names_the_one_that_it_is_about(alarm: str, known: dict[str, Known]) -> None:
    change, _ = HAPPENED[alarm]
    assert [labels["engine"] for labels in firing(change, known)[alarm]] == ["1"]


def test_a_few_requests_that_miss_are_no_alarm(known: dict[str, Known]) -> None:
    def few(here: Any, history: History) -> None:
        here.scheduler.counters.attained["default"] = Attained(both=Kept(10, 30))

    assert firing(few, known) == {}
