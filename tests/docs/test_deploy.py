"""docs/deploy.md says what deploy/ has: every alarm with its severity, and every file."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
# Read by one of the files that the page names.
READ_BY_OTHERS = {"Dockerfile.dockerignore", "prometheus.yaml", "taichi.yaml"}


def test_every_alarm_is_in_the_table_with_its_severity() -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text(encoding="utf-8"))
    alarms = {
        rule["alert"]: rule["labels"]["severity"] for group in rules["groups"] for rule in group["rules"]
    }
    assert dict(re.findall(r"^\| `(Taichi\w+)` \| (\w+) \|", TEXT, re.MULTILINE)) == alarms


def test_every_file_is_named_and_every_file_that_is_named_is_there() -> None:
    files = {path.name for path in (ROOT / "deploy").rglob("*") if path.is_file()}
    assert {name for name in files if name not in TEXT} <= READ_BY_OTHERS
    named = re.findall(r"deploy/([\w/]+\.\w+|\w+/Dockerfile)", TEXT)
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / "deploy" / name).is_file()] == []


def test_links_to_other_pages_lead_somewhere() -> None:
    for page, anchor in re.findall(r"\]\(([\w./]+?)(?:#([\w-]+))?\)", TEXT):
        target = (ROOT / "docs" / page).resolve()
        assert target.exists(), page
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}#{anchor}"
