"""Pages for operators say what the program does: their tables are held against parser and metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine  # it imports vLLM, which takes seconds

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("operations", "interface", "watching", "measuring")
TEXT = "\n".join((DOCS / f"{page}.md").read_text(encoding="utf-8") for page in PAGES)


def table(heading: str) -> dict[str, list[str]]:
    """The first table of a section: its rows by their first cell."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| \n").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {cells[0].strip("`"): cells[1:] for cells in rows[2:]}


def test_every_flag_is_in_the_table_with_its_default() -> None:
    from taichi_serve.cluster.vllm.args import make_parser
    from taichi_serve.cluster.vllm.unsaid import DEFAULTS

    serve = make_parser()._subparsers._group_actions[0].choices["serve"]
    group = next(group for group in serve._action_groups if group.title == "TaiChi")
    flags = {action.option_strings[0]: action.default for action in group._group_actions}
    rows = table("Flags")
    assert sorted(rows) == sorted(flags)
    for flag, default in flags.items():
        if default is not None:
            assert rows[flag][1] == str(default), flag
    for name, usual in DEFAULTS.items():
        assert rows[f"--{name.replace('_', '-')}"][1].startswith(f"{usual}; "), name


def test_every_refused_flag_is_named() -> None:
    from taichi_serve.cluster.vllm.refused import REFUSED

    for name in REFUSED:
        assert f"`--{name.replace('_', '-')}`" in TEXT


def test_every_metric_is_in_the_table_with_its_type() -> None:
    import inspect

    from taichi_serve.frontend import links, metrics

    source = inspect.getsource(metrics) + inspect.getsource(links)
    made = re.findall(r'(Counter|Gauge)MetricFamily\(\s*"(taichi_\w+)"', source)
    expected = {name + ("_total" if kind == "Counter" else ""): kind.lower() for kind, name in made}
    assert {name: cells[0] for name, cells in table("Metrics").items()} == expected


def test_every_route_is_in_the_table() -> None:
    from taichi_serve.frontend.page import router as page
    from taichi_serve.frontend.probes import router as probes
    from taichi_serve.frontend.routes import router
    from taichi_serve.frontend.scaling import router as scaling

    made = {
        f"{method} {route.path}".replace("request_id:path", "id")
        for route in (*router.routes, *scaling.routes, *page.routes, *probes.routes)
        for method in route.methods
    }
    assert set(table("Routes")) == made
