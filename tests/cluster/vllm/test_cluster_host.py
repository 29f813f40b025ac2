"""What a command line may say of other hosts."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from taichi_serve.cluster.vllm import args as flags


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        flags.parse(["some/model", "--d-heavy", "2", *words])
    return capsys.readouterr().err


@pytest.mark.parametrize("address", ["somewhere", "::1", "10.0.0.1:80", "0.0.0.0", "224.0.0.1"])
def test_an_address_is_one_ipv4_address_of_a_host(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert "--cluster-host must be " in refused(capsys, "--cluster-host", address)


def test_nothing_that_comes_over_a_wire_may_be_unpickled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    for words in (("--cluster-host", "10.0.0.1"), ("--ray",)):
        assert "cannot be used with VLLM_ALLOW_INSECURE_SERIALIZATION" in refused(capsys, *words)


def test_an_address_of_ray_needs_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ray-address needs --ray" in refused(capsys, "--ray-address", "10.0.0.1:6379")


def test_ray_places_instances_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--devices cannot be used with --ray" in refused(capsys, "--ray", "--devices", "0;1")


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_engines_are_kept_for_a_time(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    assert "--keep-engines must be at least 0 seconds" in refused(capsys, "--ray", "--keep-engines", seconds)


def test_ray_needs_sliders(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.parse(["some/model", "--ray"])
    assert "--ray needs sliders" in capsys.readouterr().err
