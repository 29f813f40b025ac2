"""What a search or a simulation came to: rows for a table, a config for `taichi serve`, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from taichi_serve.bench.figure import COLOURS, figure, save
from taichi_serve.bench.goodput import Tally
from taichi_serve.search.curve import Curve, lead
from taichi_serve.search.effort import RUN_ERROR, Plan
from taichi_serve.search.goodput import Contender, Scene
from taichi_serve.search.interval import Interval
from taichi_serve.search.sliders import Found


def summary(tally: Tally) -> dict[str, Any]:
    """The figures of a run: seconds, shares and counts."""
    low, high = tally.interval()
    span = max(1e-9, tally.last_at - tally.first_at)
    classes = {name: by_class(one) for name, one in tally.classes.items()}
    return {
        "sent": tally.sent,
        "finished": tally.done,
        "good": tally.good,
        "refused": tally.refused,
        "attainment": tally.attainment,
        "attainment_low": low,
        "attainment_high": high,
        "ttft": {"mean": tally.ttft.mean, **_quantiles(tally.ttft)},
        "tpot": {"mean": tally.tpot.mean, **_quantiles(tally.tpot)},
        "cached": tally.hit_ratio,
        "fetched": tally.fetched_tokens / max(1, tally.prompt_tokens),
        "moves": dict(sorted(tally.moves.items())),
        "steps": tally.steps,
        "seconds": span,
        "busy": {name: busy / span for name, busy in sorted(tally.busy.items())},
        **({"classes": classes} if classes else {}),
    }


def by_class(tally: Tally) -> dict[str, Any]:
    """The figures of one class of requests: seconds, shares and counts."""
    low, high = tally.interval()
    return {
        "sent": tally.sent,
        "good": tally.good,
        "attainment": tally.attainment,
        "attainment_low": low,
        "attainment_high": high,
        "in_time_tokens": tally.in_time_tokens,
        "ttft": {"mean": tally.ttft.mean, **_quantiles(tally.ttft)},
        "tpot": {"mean": tally.tpot.mean, **_quantiles(tally.tpot)},
    }


def _quantiles(times: Any) -> dict[str, float]:
    return {f"p{share}": times.quantile(share / 100) for share in (50, 90, 99)}


def config(scene: Scene, contender: Contender) -> dict[str, Any]:
    """The keys that `taichi serve --config` takes: sliders, SLOs and policy, and the settings of the
    instances that the step times are of. With others the search would have been about another server. What
    was done about prefixes is among them where the workload has some."""
    sliders, policy = contender.sliders, contender.policy
    return {
        "model": scene.machine.model,
        **_instance(scene, max(sliders.p_chunk, sliders.d_chunk)),
        "p_heavy": sliders.p_heavy,
        "d_heavy": sliders.d_heavy,
        "p_chunk": sliders.p_chunk,
        "d_chunk": sliders.d_chunk,
        "ttft_slo": scene.slo.ttft,
        "tpot_slo": scene.slo.tpot,
        "ttft_margin": policy.ttft_margin,
        "tpot_margin": policy.tpot_margin,
        "watermark": policy.watermark,
        "alpha": policy.alpha,
        "overload": policy.overload,
        **({"prefixes": scene.prefixes} if scene.workload.shares else {}),
    }


def _instance(scene: Scene, chunk: int) -> dict[str, Any]:
    """What makes an instance of `taichi serve` the one that was simulated."""
    machine = scene.machine
    settings = {**dict(machine.settings), "max_num_seqs": scene.max_running}
    if "max_num_batched_tokens" in settings:  # a step that was never measured may hold the largest chunk too
        settings["max_num_batched_tokens"] = max(int(settings["max_num_batched_tokens"]), chunk)
    if scene.kv_capacity is not None:  # each device of an instance holds its share of a token's KV
        held = scene.kv_capacity * machine.kv_bytes_per_token
        settings["kv_cache_memory_bytes"] = held // int(settings.get("tensor_parallel_size", 1))
    return settings


def config_text(scene: Scene, contender: Contender) -> str:
    """The same as a file, with what no key can say in its first lines."""
    machine = scene.machine
    goal = f"{scene.workload.name} within {scene.slo.ttft:g} s and {scene.slo.tpot * 1e3:g} ms a token"
    found = ", ".join((machine.name, machine.device, *machine.beside))
    lines = [f"# {contender.name}, for {goal}", f"# step times: {found}"]
    return "\n".join([*lines, yaml.safe_dump(config(scene, contender), sort_keys=False)])


def found_row(found: Found, first: Found) -> dict[str, Any]:
    """One line of the ranked table that `first` is the first of."""
    tally = found.tally
    spread, ahead = found.interval, against(found, first)
    return {
        "family": found.family,
        "contender": found.contender.name,
        "end": found.end,
        "goodput": found.rate,
        "interval": [spread.low, spread.high] if spread else None,
        "judged": curve_row(found.judged) if found.judged else None,
        "tuned": found.tuned,
        "against_first": [ahead.mean, ahead.low, ahead.high] if ahead else None,
        "share_of_bound": found.share,
        "ttft_p90": tally.ttft.quantile(0.9) if tally else None,
        "tpot_p90": tally.tpot.quantile(0.9) if tally else None,
        "moves_per_request": sum(tally.moves.values()) / tally.sent if tally and tally.sent else 0.0,
    }


def curve_row(curve: Curve) -> dict[str, Any]:
    """Rates (requests/s), and for each of them the share of good requests of every seed."""
    return {"rates": list(curve.rates), "shares": [list(shares) for shares in curve.shares]}


def against(found: Found, first: Found) -> Interval | None:
    """How far it is from the first, as a share; None where either was not judged or the first held
    nothing."""
    if found is first or not (found.judged and first.judged):
        return None
    return lead(found.judged, first.judged)


def promise(plan: Plan) -> str:
    """What the goodput of a table stands on."""
    if not plan.judging:
        return f"not judged; tuned on {len(plan.tuning)} seeds of {plan.requests} requests"
    text = (
        f"goodput: 90 % good of the requests of {len(plan.judging)} seeds, {plan.requests} each; tuned on "
        f"{len(plan.tuning)} other seeds; standard error of the work judged with {plan.error:.1%}"
    )
    if plan.rows is not None:
        text += f"; all from the {plan.rows} rows of the trace in their order, tuning and judging alike"
    if not plan.cut:
        return text
    asked = f"{plan.asked:.1%} and {RUN_ERROR:.0%} of a run ({plan.run_error:.0%} here)"
    return f"{text}. CUT SHORT: this workload needs more requests for {asked}; raise --judging and --most"


def draw_pareto(found: Sequence[Found], scene: Scene, path: Path) -> None:
    """Goodput against P90 TTFT and P90 TPOT at that rate, one point for each contender."""
    picture, axes = figure(2)
    for axis, name, limit in zip(axes, ("ttft", "tpot"), (scene.slo.ttft, scene.slo.tpot), strict=True):
        for family, colour in COLOURS.items():
            mine = [f for f in found if f.family == family and f.tally]
            times = [getattr(f.tally, name).quantile(0.9) for f in mine]
            axis.scatter([f.rate for f in mine], times, label=family, color=colour)
        axis.axhline(limit, color="grey", linestyle=":", label="SLO")
        axis.set_xlabel("goodput (requests/s)")
        axis.set_ylabel(f"P90 {name.upper()} there (s)")
    axes[0].legend()
    save(picture, path)


def draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str = "") -> None:
    """Attainment against rate; `curves` maps a name to points (requests/s, share)."""
    picture, (axis,) = figure(1)
    for name, points in curves.items():
        colour = COLOURS.get(name.split(" ")[0].rstrip(",:"))
        axis.plot([r for r, _ in points], [a for _, a in points], marker=".", label=name, color=colour)
    axis.axhline(0.9, color="grey", linestyle=":")
    axis.set_xlabel("requests/s")
    axis.set_ylabel("attainment")
    axis.set_ylim(0, 1.02)
    axis.set_title(title)
    axis.legend()
    save(picture, path)


def draw_times(tally: Tally, scene: Scene, path: Path) -> None:
    """The distributions of TTFT and TPOT with their SLOs."""
    picture, axes = figure(2)
    limits = (scene.slo.ttft, scene.slo.tpot)
    for axis, times, name, limit in zip(
        axes, (tally.ttft, tally.tpot), ("TTFT", "TPOT"), limits, strict=True
    ):
        shares = [n / 100 for n in range(1, 100)]
        axis.plot([times.quantile(s) for s in shares], shares)
        axis.axvline(limit, color="grey", linestyle=":", label="SLO")
        axis.set_xlabel(f"{name} (s)")
        axis.set_ylabel("share of requests within")
        axis.legend()
    save(picture, path)
