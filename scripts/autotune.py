"""Sliders that set themselves against the best that stand still, in simulation (results: docs/tuning.md).

usage: python scripts/autotune.py SCENARIO... [--seeds 3,4] [--only N,...]

Scenarios are start, slo, workload, drift and mix. In each the server begins with one default for everything,
and what counts are the requests that arrive SETTLED seconds after the start, or after the change, or later.
What it is held to is the best static setting found for just these requests: its goodput is the highest rate
at which 90 % of them are good. Then the self-tuned server gets a share of that rate, and must keep 90 % good.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from taichi_serve.bench.arrivals import Arrivals
from taichi_serve.bench.workload import workload
from taichi_serve.cluster.base import Scheduler, run
from taichi_serve.cluster.simulated import Call, EngineShape, Link, SimulatedCluster
from taichi_serve.latency.shipped import machine
from taichi_serve.messages import Arrived, Command, Event, Finished, Prefilled, Promised, Tuned
from taichi_serve.scheduling.policy import Policy
from taichi_serve.search.families import aggregation, disaggregation, mixed
from taichi_serve.search.goodput import Contender, Scene
from taichi_serve.sliders import Sliders
from taichi_serve.slo import SLO, tpot

SETTLED, JUDGED = 180.0, 240.0  # seconds to settle in, and seconds of arrivals that are judged after them
TARGET, SHARE = 0.9, 0.97
NEAR = 1.01  # to which ratio a goodput is found
SMALL, LARGE = "qwen2.5-14b-tp1-a100", "qwen2.5-32b-tp2-a100"
INSTANCES = {SMALL: 8, LARGE: 4}
DEFAULT = {8: Sliders(4, 4, 8192, 256), 4: Sliders(2, 2, 8192, 256)}
# The settings of docs/paper.md with the hybrid that was found for each: R_PD, S_P, S_D, TTFT margin.
SETTINGS = (
    (SMALL, "summarization", SLO(4, 0.07), Sliders(5, 3, 8192, 256), 0.5),
    (SMALL, "summarization", SLO(6, 0.05), Sliders(5, 3, 8192, 96), 0.5),
    (SMALL, "sharegpt", SLO(3, 0.11), Sliders(4, 4, 8192, 128), 0.3),
    (SMALL, "sharegpt", SLO(4, 0.07), Sliders(3, 5, 8192, 128), 0.3),
    (LARGE, "summarization", SLO(4, 0.07), Sliders(3, 1, 8192, 128), 0.3),
    (LARGE, "summarization", SLO(6, 0.05), Sliders(3, 1, 8192, 64), 0.5),
    (LARGE, "sharegpt", SLO(3, 0.11), Sliders(2, 2, 4096, 128), 0.5),
    (LARGE, "sharegpt", SLO(4, 0.07), Sliders(2, 2, 8192, 48), 0.5),
)


@dataclass
class Verdicts:
    """Stands before a scheduler, and says of every request when it arrived and whether it was good, by the
    SLO at its arrival."""

    inner: Scheduler
    slo: SLO

    def __post_init__(self) -> None:
        self.live: dict[str, tuple[float, SLO]] = {}
        self.first: dict[str, float] = {}
        self.rows: list[tuple[float, bool]] = []

    def on(self, event: Event) -> Sequence[Command]:
        """Judge, and pass it on."""
        if isinstance(event, Arrived):
            self.live[event.request] = event.at, self.slo
        elif isinstance(event, Prefilled):
            self.first.setdefault(event.request, event.at)
        elif isinstance(event, Finished):
            arrived, slo = self.live.pop(event.request)
            first = self.first.pop(event.request)
            good = slo.good(first - arrived, tpot(first, event.at, event.output_tokens))
            self.rows.append((arrived, good))
        elif isinstance(event, Promised):
            self.slo = event.slo
        return self.inner.on(event)

    def attainment(self, begin: float, end: float) -> float:
        """The share that was good of those that arrived between these times."""
        judged = [good for at, good in self.rows if begin <= at < end]
        return sum(judged) / len(judged)


@dataclass(frozen=True)
class Course:
    """What happens: requests at a rate, and facts from outside; and the seconds that are judged."""

    scene: Scene
    instances: int
    calls: Callable[[float], Iterable[Call]]  # from a rate
    begin: float
    end: float
    happenings: tuple[Event, ...] = ()

    def run(self, rate: float, static: Contender | None) -> tuple[float, list[Tuned]]:
        """The attainment at a rate of a setting that stands still, or of sliders that set themselves."""
        scene, found = self.scene, self.scene.machine
        sliders = static.sliders if static else DEFAULT[self.instances]
        cluster = SimulatedCluster(
            sliders,
            [found.truth],
            EngineShape(found.kv_capacity, scene.max_running, scene.workload.block_size),
            Link(found.kv_bytes_per_token, scene.bandwidth, scene.latency),
            self.calls(rate),
            self.happenings,
            found.max_model_len,
        )
        policy = static.policy if static else Policy()
        scheduler = scene.scheduler(sliders, policy, cluster.capacities)
        tuner = None if static else scene.tuner(scheduler)
        verdicts = Verdicts(tuner or scheduler, scene.slo)
        run(verdicts, cluster)
        return verdicts.attainment(self.begin, self.end), list(tuner.changes) if tuner else []

    def goodput(self, static: Contender, guess: float) -> float:
        """The highest rate at which a static setting keeps the target."""
        low, high = 0.0, guess
        while self.run(high, static)[0] >= TARGET:
            low, high = high, high * 1.1
        while not low:
            rate = high / 1.1
            low, high = (rate, high) if self.run(rate, static)[0] >= TARGET else (0.0, rate)
        while high > low * NEAR:
            middle = (low + high) / 2
            low, high = (middle, high) if self.run(middle, static)[0] >= TARGET else (low, middle)
        return low

    def best(self, field: Iterable[Contender], guess: float) -> tuple[Contender, float]:
        """The one with the highest goodput; who does not keep what the best so far does is out at once."""
        first, rate = None, 0.0
        for one in field:
            if first is None or self.run(rate * NEAR, one)[0] >= TARGET:
                first, rate = one, self.goodput(one, max(rate * NEAR, guess))
        assert first is not None
        return first, rate


def scene_of(profile: str, load: str, slo: SLO, cv: float | None = None) -> Scene:
    """A setting with its workload."""
    found = machine(profile)
    limit = min(found.max_model_len, found.kv_capacity)
    return Scene(found, workload(load, limit, arrivals=Arrivals.of(None, cv)), slo)


def at_rate(scene: Scene, seconds: float, seed: int, begin: float = 0.0) -> Callable[[float], Iterator[Call]]:
    """Requests of a scene for so many seconds, from `begin` on."""

    def calls(rate: float) -> Iterator[Call]:
        for call in scene.workload.calls(rate, round(rate * seconds), seed):
            yield replace(call, at=call.at + begin)

    return calls


def neighbours(sliders: Sliders, margin: float) -> list[Contender]:
    """A setting that was found best, and those around it."""
    found = []
    for p_heavy in range(max(1, sliders.p_heavy - 1), min(sliders.instances - 1, sliders.p_heavy + 1) + 1):
        for ratio in (1.0, 0.67, 1.5):
            chunk = round(sliders.d_chunk * ratio / 16) * 16
            split = Sliders(p_heavy, sliders.instances - p_heavy, sliders.p_chunk, chunk)
            found.append(mixed(split, Policy(ttft_margin=margin)))
    found.sort(key=lambda one: one.sliders != sliders)
    return found


def told(name: str, course: Course, rate: float, share: float, best: Contender) -> None:
    """Run with sliders that set themselves, and print what came of it."""
    began = time.perf_counter()
    there, _ = course.run(rate * share, best)
    reached, changes = course.run(rate * share, None)
    late = [c for c in changes if course.begin <= c.at < course.end]
    minutes = (course.end - course.begin) / 60
    print(
        f"{name}: best static {best.name} {rate:.2f}/s; at {share:.0%} of that {there:.1%} good, self-tuned "
        f"{reached:.1%}; {len(changes)} changes, {len(late) / minutes:.1f} a minute of those judged; "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    for change in changes:
        print(f"  {change.at:6.1f} s  {change.why}", flush=True)


def guess_of(profile: str, load: str) -> float:
    """Requests/s to begin with."""
    each = 0.75 if load == "summarization" else 6.5
    return each * INSTANCES[profile] * (0.85 if profile == LARGE else 1.0)


def named(profile: str, load: str, slo: SLO, seed: int) -> str:
    """A setting in words."""
    return f"{profile} {load} {slo.ttft:g} s {slo.tpot * 1e3:g} ms, seed {seed}"


def start(seed: int, number: int) -> None:
    """From the default, three minutes after the start."""
    profile, load, slo, sliders, margin = SETTINGS[number]
    scene = scene_of(profile, load, slo)
    end = SETTLED + JUDGED
    course = Course(scene, INSTANCES[profile], at_rate(scene, end, seed), SETTLED, end)
    best, rate = course.best(neighbours(sliders, margin), guess_of(profile, load))
    told(f"start {number}: {named(profile, load, slo, seed)}", course, rate, SHARE, best)


CHANGE = 300.0  # seconds until something changes


def another_slo(seed: int, number: int) -> None:
    """Three minutes after a change between the two SLOs of a summarization setting."""
    first, second = (4, 5) if number == 0 else (5, 4)
    profile, load, slo, *_ = SETTINGS[first]
    _, _, after, sliders, margin = SETTINGS[second]
    scene = scene_of(profile, load, slo)
    begin, end = CHANGE + SETTLED, CHANGE + SETTLED + JUDGED
    happens = (Promised(CHANGE, after),)
    course = Course(scene, INSTANCES[profile], at_rate(scene, end, seed), begin, end, happens)
    best, rate = course.best(neighbours(sliders, margin), guess_of(profile, load))
    told(f"slo {number}: {named(profile, load, slo, seed)} -> {after}", course, rate, SHARE, best)


def another_workload(seed: int, number: int) -> None:
    """Three minutes after a change from chat to summarization, or back; before it runs at 90 % of what the
    paper's setting holds."""
    first, second = (7, 4) if number == 0 else (4, 7)
    before = 23.0 if number == 0 else 2.37
    profile, load, slo, *_ = SETTINGS[first]
    _, then, _, sliders, margin = SETTINGS[second]
    ahead, scene = scene_of(profile, load, slo), scene_of(profile, then, slo)
    begin, end = CHANGE + SETTLED, CHANGE + SETTLED + JUDGED

    later = at_rate(scene, SETTLED + JUDGED, seed, CHANGE)

    def calls(rate: float) -> Iterator[Call]:
        yield from (call for call in at_rate(ahead, CHANGE * 1.2, seed)(before) if call.at < CHANGE)
        yield from later(rate)

    course = Course(scene, INSTANCES[profile], calls, begin, end)
    after = replace(course, calls=later)  # what stands still need not see what was before
    best, rate = after.best(neighbours(sliders, margin), guess_of(profile, then))
    told(f"workload {number}: {load} -> {named(profile, then, slo, seed)}", course, rate, SHARE, best)


def every_family(instances: int) -> list[Contender]:
    """Static settings of all three families."""
    hybrids = [
        mixed(Sliders(p, instances - p, 8192, chunk), Policy(ttft_margin=margin))
        for p in range(1, instances)
        for chunk in (48, 64, 96, 128, 192, 256)
        for margin in (0.3, 0.5)
    ]
    return baselines(instances) + hybrids


def baselines(instances: int) -> list[Contender]:
    """Static settings of the two families that are no hybrid."""
    return [*disaggregation(instances, 8192), *aggregation(instances, 8192)]


def drift(seed: int, number: int) -> None:
    """Prompts that grow from 0.8 to 1.2 times their length in ten minutes, in bursts (CV 2)."""
    profile, load, slo, *_ = SETTINGS[(4, 5)[number]]
    scene = scene_of(profile, load, slo, cv=2.0)
    seconds = SETTLED + 600.0

    def calls(rate: float) -> Iterator[Call]:
        for call in at_rate(scene, seconds, seed)(rate):
            longer = 0.8 + 0.4 * min(1.0, max(0.0, (call.at - SETTLED) / 600.0))
            yield replace(call, prompt_tokens=max(1, min(28_000, round(call.prompt_tokens * longer))))

    course = Course(scene, INSTANCES[profile], calls, SETTLED, seconds)
    best, rate = course.best(every_family(INSTANCES[profile]), guess_of(profile, load))
    told(f"drift {number}: {named(profile, load, slo, seed)}", course, rate, 1.0, best)


def mix(seed: int, number: int) -> None:
    """Of the requests 80 % chat and 20 % summarization, against the better of the two tuned baselines."""
    profile = (LARGE, SMALL)[number]
    slo = SLO(4, 0.07)
    chat, summaries = scene_of(profile, "sharegpt", slo), scene_of(profile, "summarization", slo)
    end = SETTLED + JUDGED

    def calls(rate: float) -> Iterator[Call]:
        chance = random.Random(f"mix {seed}")
        longer = at_rate(summaries, end, seed)(rate)
        for call in at_rate(chat, end, seed)(rate):
            other = next(longer)
            yield call if chance.random() < 0.8 else replace(other, at=call.at)

    course = Course(chat, INSTANCES[profile], calls, SETTLED, end)
    best, rate = course.best(baselines(INSTANCES[profile]), 1.5 * INSTANCES[profile])
    name = f"mix {number}: {named(profile, '80 % chat, 20 % summarization', slo, seed)}"
    for share in (1.0, 1.08):
        told(name, course, rate, share, best)


SCENARIOS: dict[str, tuple[int, Callable[[int, int], None]]] = {
    "start": (len(SETTINGS), start),
    "slo": (2, another_slo),
    "workload": (2, another_workload),
    "drift": (2, drift),
    "mix": (2, mix),
}


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=list(SCENARIOS))
    parser.add_argument("--seeds", default="3", help="of the requests")
    parser.add_argument("--only", default="", help="numbers of settings")
    args = parser.parse_args()
    for name in args.scenarios:
        count, scenario = SCENARIOS[name]
        for number in map(int, args.only.split(",")) if args.only else range(count):
            for seed in map(int, args.seeds.split(",")):
                scenario(seed, number)


if __name__ == "__main__":
    main()
