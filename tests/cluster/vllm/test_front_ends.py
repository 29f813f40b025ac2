"""How many front ends a command line has: what it says, or one for every two instances on accelerators."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from taichi_serve.cluster.vllm import args as flags
from taichi_serve.cluster.vllm.front_ends import front_ends, remark

LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
STORE = "VLLM_ENABLE_RESPONSES_API_STORE"


def found(*words: str) -> tuple[int, str | None]:
    """How many front ends, and what the log is to say of them."""
    args = flags.parse(["some/model", *words])
    return front_ends(args), remark(args)


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)


@pytest.mark.usefixtures("accelerators")
@pytest.mark.parametrize(
    ("p_heavy", "d_heavy", "count"), [(0, 1, 1), (1, 1, 1), (1, 2, 1), (2, 2, 2), (4, 4, 4), (0, 200, 64)]
)
def test_two_instances_on_accelerators_have_one_front_end(p_heavy: int, d_heavy: int, count: int) -> None:
    assert found("--p-heavy", str(p_heavy), "--d-heavy", str(d_heavy)) == (count, None)


@pytest.mark.usefixtures("accelerators")
def test_instances_that_vllms_flag_names_count_too() -> None:
    assert found("--data-parallel-size", "4") == (2, None)


@pytest.mark.usefixtures("accelerators")
@pytest.mark.parametrize("count", [1, 3, 64])
def test_a_number_that_is_given_is_taken(count: int) -> None:
    assert found("--d-heavy", "4", "--api-server-count", str(count)) == (count, None)


def test_on_a_cpu_there_is_one() -> None:
    assert found("--p-heavy", "4", "--d-heavy", "4") == (1, None)
    assert found("--d-heavy", "4", "--api-server-count", "2") == (2, None)


@pytest.mark.usefixtures("accelerators")
def test_what_takes_one_front_end_only_has_one_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = "--otlp-traces-endpoint", "http://127.0.0.1:4317"
    said = "one front end and not 2, which cannot be used with --otlp-traces-endpoint"
    assert found("--d-heavy", "4", *traces) == (1, said)
    assert found("--d-heavy", "1", *traces) == (1, None)
    assert found("--d-heavy", "4", "--api-server-count", "1", *traces) == (1, None)
    for name in (STORE, LORA):
        monkeypatch.setenv(name, "1")
        count, words = found("--d-heavy", "8")
        assert (count, (words or "").partition(":")[0]) == (
            1,
            f"one front end and not 4, which cannot be used with {name}",
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--api-server-count", "65"), "--api-server-count must be between 1 and 64, not 65"),
        (
            ("--api-server-count", "2", "--otlp-traces-endpoint", "http://127.0.0.1:4317"),
            "--api-server-count above 1 cannot be used with --otlp-traces-endpoint",
        ),
    ],
)
def test_a_number_that_cannot_be_is_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        found(*words)
    assert said in capsys.readouterr().err
