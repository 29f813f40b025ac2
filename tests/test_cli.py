"""The command as somebody types it: with wrong words, missing files, and no engines installed."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taichi_serve import cli

# What a machine without engines lacks. The command is run as it is, in a process of its own.
WITHOUT_ENGINES = """
import sys
GONE = {"vllm", "torch", "nixl", "zmq", "uvloop", "fastapi", "starlette", "uvicorn", "prometheus_client"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from taichi_serve.cli import main
main()
"""
GOAL = "--workload 100/10 --ttft-slo 1 --tpot-slo 1"
ONE = f"simulate {GOAL} --p-heavy 0 --d-heavy 1 --p-chunk 0 --d-chunk 128 --rate 1 --requests 5 --json"
SMALL = "--instances 2 --seconds 1 --most 40 --judging 80 --processes 1 --family aggregation"
NOT_INSTALLED = "vLLM is not installed: pip install 'taichi-serve[cuda]', or 'taichi-serve[cpu]'"


def without_engines(words, here):
    command = [sys.executable, "-c", WITHOUT_ENGINES, *words.split()]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def here(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("serve", f"taichi serve: {NOT_INSTALLED}"),
        ("serve ./model --p-heavy 1", f"taichi serve: {NOT_INSTALLED}"),
        ("demo", f"taichi demo: {NOT_INSTALLED}"),
        (f"bench goodput ./model {GOAL}", f"taichi bench: {NOT_INSTALLED}"),
        ("profile ./model -o p.json", f"taichi profile: error: {NOT_INSTALLED}"),
    ],
)
def test_without_engines_what_needs_them_says_so_in_one_line(words, line, here):
    ended = without_engines(words, here)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1] == line
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "words", ["", "--help", "--version", "demo --help", "bench goodput --help", "profile --help", ONE]
)
def test_without_engines_everything_else_works(words, here):
    ended = without_engines(words, here)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


def test_without_engines_a_search_writes_its_config_and_a_log_is_explained(here):
    assert without_engines(f"search {GOAL} {SMALL} --out best.yaml", here).returncode == 0
    assert (here / "best.yaml").read_text().startswith("# aggregation")
    facts = {"at": 1.0, "request": "cmpl-1-0", "prompt_tokens": 5, "max_tokens": 2}
    (here / "events.jsonl").write_text(json.dumps({"on": ["Arrived", facts], "do": []}) + "\n")
    ended = without_engines("explain cmpl-1-0 --log events.jsonl", here)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "5 prompt tokens, at most 2 output" in ended.stdout


def test_without_engines_a_server_elsewhere_can_be_measured(here):
    ended = without_engines(f"bench goodput http://127.0.0.1:1 {GOAL}", here)
    assert ended.returncode == 2
    assert ended.stderr.startswith("taichi bench: http://127.0.0.1:1: cannot be reached: ")


def told(capsys, *words):
    try:
        status = cli.main(list(words))
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


def test_the_version_is_one_line(capsys):
    status, out, _ = told(capsys, "--version")
    assert status == 0
    assert re.fullmatch(rf"taichi-serve {re.escape(importlib.metadata.version('taichi-serve'))}, .+\n", out)


@pytest.mark.parametrize("words", [["nothing"], ["--nothing"], ["Serve"], [""]])
def test_an_unknown_command_is_one_line(words, capsys):
    status, out, err = told(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"taichi: unknown command {words[0]!r}; there are serve, demo, ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", ["bench", "bench nothing", "bench goodput", "explain", "profile", "search"])
def test_words_that_are_missing_are_named(words, capsys):
    status, _, err = told(capsys, *words.split())
    assert status == 2
    assert re.search(r"error: (the following arguments are required|argument goodput: invalid choice)", err)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            f"search {GOAL} --out /nowhere/best.yaml",
            "--out: /nowhere/best.yaml: there is no directory",
        ),
        (f"search {GOAL} --out .", "--out: .: is a directory"),
        (f"search {GOAL} --tuned /dev/null/x", "/dev/null/x: cannot be made: Not a directory"),
        (f"search {GOAL} --plot /dev/null/x", "/dev/null/x: cannot be made: Not a directory"),
        (f"{ONE} --plot /dev/null/x", "/dev/null/x: cannot be made: Not a directory"),
        (f"{ONE} --profile /nowhere/p.json", "profile '/nowhere/p.json' is no file, and none of "),
        (f"{ONE} --tensor-parallel 0", "--tensor-parallel: must be at least 1, not 0"),
        ("demo --json /nowhere/x", "/nowhere/x: there is no directory /nowhere"),
    ],
)
def test_what_cannot_be_read_or_written_is_told_before_anything_is_done(words, line, capsys):
    status, out, err = told(capsys, *words.split())
    assert (status, out) == (2, "")
    assert err.startswith(f"taichi {words.split()[0]}: {line}")
    assert err.count("\n") == 1


def test_a_reader_that_has_read_enough_is_no_error():
    command = f"{sys.executable} -m taichi_serve.cli simulate --help | head -c 1; echo ${{PIPESTATUS[0]}}"
    shell = ["bash", "-c", command]
    ended = subprocess.run(shell, capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert "Traceback" not in ended.stderr
