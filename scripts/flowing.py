"""What flowing decode gives, in simulation: watermarks against none, with the same sliders and requests.

    python scripts/flowing.py [--kv 200000,50000,25000] [--watermarks 0.95,0.8] [--seeds 3,4,5]
                              [--sliders 1,1,8192,256] [--workload sharegpt] [--slo 3,0.11]

With a watermark of 1 nobody is degraded, and no decode is put on a P-heavy instance: that is what the others
are compared with. For each capacity of KV (tokens of an instance) and seed the goodput of each is bisected;
printed are the ratios, their mean with its 95 % interval, and the moves of Algorithm 1 at its goodput.

A watermark of t0.8 is a rule that is tried here, and that no server has: beside the watermark of 0.95 the
longest output is degraded too while the TPOT of a D-heavy instance is predicted above 0.8 of the SLO, if a
P-heavy one is predicted to be faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from taichi_serve.bench.pairs import quantile
from taichi_serve.bench.workload import workload
from taichi_serve.instance import Instance
from taichi_serve.latency.shipped import machine
from taichi_serve.messages import Command, Move
from taichi_serve.scheduling.decode import choose_target
from taichi_serve.scheduling.policy import Policy
from taichi_serve.scheduling.scheduler import GlobalScheduler
from taichi_serve.search.families import mixed
from taichi_serve.search.goodput import Contender, Scene, attain
from taichi_serve.sliders import Kind, Sliders
from taichi_serve.slo import SLO

TARGET = 0.9
LITERAL = 0.95  # the watermark beside the rule that is tried
NEAR = 1.01  # to which ratio a goodput is found


class ByTpot(GlobalScheduler):
    """Degrades the longest output where decodes are slow, too; one in a step."""

    share = 1.0  # of the TPOT SLO

    def _degrade(self, source: Instance, now: float) -> list[Command]:
        commands = super()._degrade(source, now)
        here = self.predictor.tpot(source, 0)
        if commands or source.leaving_tokens or here <= self.share * self.slo.tpot:
            return commands
        helpers = [i for i in self.instances.values() if i.serving and i.kind is Kind.P_HEAVY]
        residents = self.ledger.residents[source.name]
        for name, _ in zip(residents.longest(), range(self.policy.scan), strict=False):
            request = self.requests[name]
            kv_tokens = request.prompt_tokens + request.output_tokens(source.ticks)
            target = choose_target(helpers, kv_tokens, self.policy.full_mark, self.policy)
            if target is None or self.predictor.tpot(target, kv_tokens) >= here:
                continue
            gap = self.predictor.move(source, target, kv_tokens)
            slack, stays = residents.slack(request, now, source.ticks), self.policy.dwell
            if now - request.moved_at >= stays and slack > gap:
                why = "its decodes are slow"
                return [self._dispatcher.flow(request, target, Move.DEGRADE, now, why, helpers)]
        return []


@dataclass(frozen=True)
class Pressed(Scene):
    """A scene whose schedulers degrade by TPOT, too."""

    share: float = 1.0

    def scheduler(self, sliders: Sliders, policy: Policy, capacities: Mapping[str, int]) -> GlobalScheduler:
        """The one that is tried."""
        made = ByTpot(sliders, self.slo, self.predictor(), policy, capacities)
        made.share = self.share
        return made


def goodput(scene: Scene, one: Contender, requests: int, seed: int, guess: float) -> float:
    """The highest rate (requests/s) at which it keeps the target."""

    def kept(rate: float) -> bool:
        return attain(scene, one, rate, requests, seed, TARGET).attainment >= TARGET

    low, high = 0.0, guess
    while kept(high):
        low, high = high, 2 * high
    while high > NEAR * low and high > 1e-3:
        middle = (low + high) / 2 if not low else (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low


def moves(scene: Scene, one: Contender, requests: int, seed: int, rate: float) -> str:
    """How often requests were degraded and flowed back at this rate, for each request."""
    cluster = scene.cluster(one.sliders, rate, requests, seed)
    scheduler = scene.scheduler(one.sliders, one.policy, cluster.capacities)
    for event in cluster.facts():
        for command in scheduler.on(event):
            cluster.send(command)
    counts = {move.value: count for move, count in scheduler.counters.moves.items()}
    return f"{counts.get('degrade', 0) / requests:.2f} and {counts.get('backflow', 0) / requests:.2f}"


def told(scene: Scene, sliders: Sliders, args: argparse.Namespace) -> None:
    """One capacity: every watermark against none."""
    seeds = [int(seed) for seed in args.seeds.split(",")]
    still = mixed(sliders, Policy(watermark=1.0))
    before = [goodput(scene, still, args.requests, seed, args.guess) for seed in seeds]
    mean = statistics.fmean(before)
    print(f"KV {scene.machine.kv_capacity}: watermark 1: {mean:.3g} requests/s", flush=True)
    for word in args.watermarks.split(","):
        mark = LITERAL if word.startswith("t") else float(word)
        one = mixed(sliders, Policy(watermark=mark))
        there = Pressed(**vars(scene), share=float(word[1:])) if word.startswith("t") else scene
        found = [goodput(there, one, args.requests, seed, args.guess) for seed in seeds]
        ratios = [mine / theirs for mine, theirs in zip(found, before, strict=True)]
        half = quantile(len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5
        made = moves(there, one, args.requests, seeds[0], found[0])
        each = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"  watermark {word}: {statistics.fmean(found):.3g} requests/s, ratio "
            f"{statistics.fmean(ratios):.3f} +- {half:.3f} ({each}); degraded and back, a request: {made}",
            flush=True,
        )


def main() -> None:
    """The command."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--profile", default="qwen2.5-14b-tp1-a100")
    parser.add_argument("--workload", default="sharegpt")
    parser.add_argument("--slo", default="3,0.11", metavar="TTFT,TPOT", help="seconds")
    parser.add_argument("--sliders", default="1,1,8192,256", metavar="P,D,S_P,S_D")
    parser.add_argument("--kv", default="200000,50000,25000", help="tokens of an instance")
    parser.add_argument("--watermarks", default="0.95,0.8,0.6,t0.8")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--seeds", default="3,4,5")
    parser.add_argument("--guess", type=float, default=8.0, help="requests/s to begin with")
    args = parser.parse_args()
    found, (ttft, tpot) = machine(args.profile), map(float, args.slo.split(","))
    sliders = Sliders(*map(int, args.sliders.split(",")))
    for word in args.kv.split(","):
        less = replace(found, kv_capacity=int(word))
        limit = min(less.max_model_len, less.kv_capacity)
        told(Scene(less, workload(args.workload, limit), SLO(ttft, tpot)), sliders, args)


if __name__ == "__main__":
    main()
