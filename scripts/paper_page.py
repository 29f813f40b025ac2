"""The page docs/paper.md from the figures that scripts/paper.py kept: tables, pictures and what is said about
them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taichi_serve.search.curve import Curve, lead
from taichi_serve.search.report import draw_curves

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
Json = dict[str, Any]


def percent(pair: Sequence[float]) -> str:
    """A share with its interval."""
    return f"{pair[0]:.0%} ± {pair[1]:.0%}".replace("%", " %")


def rate(pair: Sequence[float]) -> str:
    """A rate with its interval."""
    return f"{pair[0]:.2f} ± {pair[1]:.2f}"


def paired(ours: Json, theirs: Json) -> str:
    """How far ours lead: the same requests for both, so the interval is free of their luck."""
    found = lead(curve(ours), curve(theirs))
    return f"{found.mean:+.1%} ± {found.half:.1%}" if found else "-"


def curve(row: Json) -> Curve:
    """The shares of good requests that were kept."""
    kept = row["curve"]
    return Curve(tuple(kept["rates"]), tuple(tuple(shares) for shares in kept["shares"]))


def stood_on(kept: Json) -> str:
    """How many seeds of how many requests judged the settings, and of which day and commit that is."""
    rows = kept["rows"]
    runs = sorted({f"{r['judging']} x {r['requests']}" for r in rows})
    error, made = max(r["error"] for r in rows), sorted({r["made"] for r in rows})
    text = (
        f"Judged on (seeds x requests): {', '.join(runs)}; standard error of their work at most {error:.1%}. "
    )
    return f"{text}Run on {'; '.join(made)}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page_table2(kept: Json) -> str:
    """Table 2 with the likely configurations."""
    rows = [
        [
            f"{r['slo'][0]:g} s, {r['slo'][1] * 1e3:g} ms",
            f"{r['paper'][0]} %",
            percent(aggregation),
            f"{r['paper'][1]} %",
            percent(disaggregation),
            percent(hybrid),
        ]
        for r in kept["rows"]
        for aggregation, disaggregation, hybrid in [r["ours"].values()]
    ]
    curves = {name: [(p[0], p[1]) for p in points] for name, points in kept["curves"].items()}
    draw_curves(curves, DOCS / "paper/table2.svg", "Llama-2-70B, arXiv, SLO 6 s and 100 ms")
    first, second, third = kept["rows"][0]["ours"]
    head = ("SLO", "aggregation: paper", first, "disaggregation: paper", second, third)
    return table(head, rows)


def noted(row: Json) -> str:
    """What won; a hybrid that is an end of the sliders, or behaved like one, is called so."""
    label = str(row["contender"]).removeprefix("aggregation ")
    if row.get("end"):
        return f"= {row['end']} {label}"
    alone = "moves" in row and " S_D 0 " in label and not row["moves"].get("degrade")
    return f"{label}; nobody degraded" if alone else label


def page_goodput(kept: Json) -> str:
    """Goodput of every family, tuned."""
    rows = []
    for r in kept["rows"]:
        mine = r["rows"]
        base = max(("aggregation", "disaggregation"), key=lambda name: mine[name]["goodput"][0])
        cells = []
        for name in ("aggregation", "whole prompts", "disaggregation", "literal", "hybrid"):
            note = f" ({noted(mine[name])})" if name not in ("literal", "whole prompts") else ""
            cells.append(rate(mine[name]["goodput"]) + note)
        lead = paired(mine["hybrid"], mine[base])
        slo = f"{r['slo'][0]:g} s, {r['slo'][1] * 1e3:g} ms"
        head = f"{r['workload']} {slo}" if "workload" in r else slo
        share = mine["hybrid"]["goodput"][0] / r["bound"]
        rows.append([head, *cells, f"{r['bound']:.2f}", f"{share:.0%}", lead])
    head = (
        "",
        "aggregation",
        "whole prompts",
        "disaggregation",
        "literal",
        "hybrid",
        "bound",
        "hybrid of bound",
    )
    told = table((*head, "hybrid against best baseline"), rows)
    return f"{told}\n\n{stood_on(kept)}" if rows else told


def page_leads(kept: Path) -> str:
    """The hybrid over each tuned baseline, with the same requests, in every goodput setting."""
    rows = []
    for name in ("goodput_14b", "goodput_32b"):
        for r in settings(kept, name)["rows"]:
            mine = r["rows"]
            leads = [paired(mine["hybrid"], mine[base]) for base in ("aggregation", "disaggregation")]
            size = name.removeprefix("goodput_").upper()
            rows.append([f"{size} {r['workload']} {r['slo'][0]:g} s, {r['slo'][1] * 1e3:g} ms", *leads])
    return table(("", "over aggregation", "over disaggregation"), rows)


def page_ablation(kept: Json) -> str:
    """The ablation at three rates."""
    head = ("", "paper", *(f"{r:g} requests/s" for r in kept["rates"]))
    rows = [[r["name"], f"{r['paper']} %", *(percent(p) for p in r["ours"])] for r in kept["rows"]]
    return table(head, rows)


def page_interference(kept: Json) -> str:
    """The line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.scatter([p[0] for p in kept["points"]], [p[1] * 1e3 for p in kept["points"]], s=4)
    axis.set_xlabel("interference intensity (prompt tokens per output token)")
    axis.set_ylabel("TPOT (ms)")
    figure.savefig(DOCS / "paper/interference.png", dpi=90)
    return (
        f"TPOT = {kept['intercept'] * 1e3:.1f} ms + {kept['slope'] * 1e6:.0f} µs x intensity over "
        f"{kept['n']} requests, R² = {kept['r2']:.3f} (paper: 0.99)."
    )


PARTS = {
    "goodput_14b": "qwen2.5-14b",
    "goodput_32b": "qwen2.5-32b",
    "table2_tuned": "table2-",
}


def settings(kept: Path, name: str) -> Json:
    """The settings of a stage that were run."""
    parts = sorted(kept.glob(f"{PARTS[name]}*.part.json"))
    return {"rows": [json.loads(part.read_text()) for part in parts]}


def write(kept: Path) -> None:
    """Fill the page's places with the figures that are there."""
    pages = {"table2": page_table2, "ablation": page_ablation, "interference": page_interference}
    (DOCS / "paper").mkdir(parents=True, exist_ok=True)
    text = (ROOT / "scripts/paper.template.md").read_text()
    for name, page in pages.items():
        path = kept / f"{name}.json"
        told = page(json.loads(path.read_text())) if path.exists() else "Not run yet."
        text = text.replace("{{" + name + "}}", told)
    for name in PARTS:
        text = text.replace("{{" + name + "}}", page_goodput(settings(kept, name)))
    (DOCS / "paper.md").write_text(text.replace("{{leads}}", page_leads(kept)))
