"""Container, compose, systemd and Kubernetes: their files agree with each other and with the server."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ways import (
    DEPLOY,
    DRAINED,
    HOME,
    INSTALL,
    PROJECT,
    ROOT,
    compose,
    container,
    manifests,
    pod,
    probed,
    read,
    said,
    seconds,
    unit,
    value,
)

from taichi_serve.frontend.ending import STOP_SECONDS

# ---------------------------------------------------------------------------------------------- the container


def test_the_image_is_made_by_the_script_alone() -> None:
    scripts = [run for run in said("RUN") if "useradd" not in run]
    assert len(scripts) == 1
    assert scripts[0].startswith('/tmp/taichi/install.sh "$DEVICE" /tmp/taichi ')


def test_the_image_runs_the_command_as_a_user_of_its_own() -> None:
    (entry,) = said("ENTRYPOINT")
    assert entry == '["taichi-serve"]'
    assert "taichi-serve" in PROJECT["scripts"]
    assert said("USER") == ["taichi"]
    assert said("VOLUME") == [HOME]
    assert f"HOME={HOME}" in said("ENV")[0]


def test_what_the_image_copies_is_there_and_is_sent_to_the_builder() -> None:
    copied = {source for copy in said("COPY") for source in copy.split()[:-1]}
    sent = {
        line[1:] for line in read("container/Dockerfile.dockerignore").splitlines() if line.startswith("!")
    }
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)
    assert {*PROJECT["license-files"], "pyproject.toml", "src"} <= copied


def test_the_script_is_bash_and_knows_the_extras() -> None:
    assert subprocess.run(["bash", "-n", str(INSTALL)], check=False).returncode == 0
    assert INSTALL.stat().st_mode & 0o111
    assert {"cpu", "cuda"} <= set(PROJECT["optional-dependencies"])
    assert 'install "${SOURCE}[$DEVICE]"' in INSTALL.read_text()


@pytest.mark.parametrize(("words", "code"), [(["gpu", "."], 2), ([], 1), (["cpu"], 1)])
def test_the_script_refuses_wrong_words_before_it_does_anything(words: list[str], code: int) -> None:
    command = [shutil.which("bash") or "bash", str(INSTALL), *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/nowhere"})
    assert ended.returncode == code
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1


def test_pytorch_for_cpus_is_the_same_everywhere() -> None:
    texts = [INSTALL.read_text(), (ROOT / "scripts/setup.sh").read_text(), (ROOT / "README.md").read_text()]
    pins = {pin for text in texts for pin in re.findall(r"torch==[\d.]+\+cpu", text)}
    assert len(pins) == 1, pins


# ------------------------------------------------------------------------------------------------- compose


def test_ports_agree_from_the_server_to_the_scraper_and_the_board() -> None:
    services = compose()["services"]
    port = value(services["taichi"]["command"], "--port")
    assert said("EXPOSE") == [port]
    assert f"127.0.0.1:{port}/ready" in said("HEALTHCHECK")[0]
    assert services["taichi"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    scraping = yaml.safe_load(read("prometheus/prometheus.yml"))
    assert scraping["scrape_configs"][0]["static_configs"] == [{"targets": [f"taichi:{port}"]}]
    source = yaml.safe_load(read("grafana/provisioning/datasources/prometheus.yaml"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]


def test_what_compose_mounts_is_there() -> None:
    described = compose()
    for service in described["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            there = (
                (DEPLOY / "compose" / source).is_dir() if "/" in source else source in described["volumes"]
            )
            assert there, mount
    assert f"models:{HOME}" in described["services"]["taichi"]["volumes"]
    context = DEPLOY / "compose" / described["services"]["taichi"]["build"]["context"]
    assert (context / described["services"]["taichi"]["build"]["dockerfile"]).is_file()
    home = described["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana" / "dashboards" / Path(home).name).is_file()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_device_is_a_file_over_the_same_services(device: str) -> None:
    over = compose(f"compose.{device}.yaml")["services"]
    assert set(over) == {"taichi"}
    assert over["taichi"]["build"]["args"] == {"DEVICE": device}
    assert over["taichi"]["image"] == f"taichi-serve:{device}"


# ------------------------------------------------------------------------------------------- a graceful end


def test_whoever_stops_the_server_waits_longer_than_it_takes() -> None:
    service = compose()["services"]["taichi"]
    settings = yaml.safe_load(read("systemd/serve.yaml"))
    pause = float(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    ends = {
        "compose": (
            float(value(service["command"], "--shutdown-timeout")),
            seconds(service["stop_grace_period"]),
        ),
        "systemd": (float(settings["shutdown-timeout"]), seconds(unit()["Service"]["TimeoutStopSec"][0])),
        "kubernetes": (
            float(value(container()["args"], "--shutdown-timeout")) + pause,
            float(pod()["terminationGracePeriodSeconds"]),
        ),
    }
    for way, (asked, given) in ends.items():
        assert given >= asked + DRAINED + STOP_SECONDS, way


# ------------------------------------------------------------------------------------------------- systemd


def test_the_service_runs_the_command_with_its_file_of_flags() -> None:
    service = unit()["Service"]
    (command,) = service["ExecStart"]
    assert command == "/opt/taichi/bin/taichi-serve serve --config /etc/taichi/serve.yaml"
    assert "VENV=${3:-/opt/taichi}" in INSTALL.read_text()
    assert f"HOME={HOME}" in service["Environment"]
    assert service["StateDirectory"] == [Path(HOME).name]
    assert f"TMPDIR=/run/{service['RuntimeDirectory'][0]}" in service["Environment"]


def test_wrong_flags_are_not_tried_again_and_everything_else_is() -> None:
    service = unit()["Service"]
    assert service["Restart"] == ["on-failure"]
    assert service["RestartPreventExitStatus"] == ["2"]
    assert service["SuccessExitStatus"] == ["130"]  # SIGTERM before it was ready
    assert service["KillMode"] == ["mixed"]  # SIGTERM for the server, which ends its instances itself


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_knows_every_key_of_the_unit() -> None:
    command = ["systemd-analyze", "verify", str(DEPLOY / "systemd" / "taichi.service")]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    ours = [line for line in told if "taichi.service" in line and "is not executable" not in line]
    assert ours == []


# ---------------------------------------------------------------------------------------------- Kubernetes


def test_ports_of_the_pod_the_service_and_the_scraper_agree() -> None:
    (port,) = container()["ports"]
    assert str(port["containerPort"]) == value(container()["args"], "--port")
    (served,) = manifests()["Service"]["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    annotations = manifests()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"]["port"] == port["name"]


def test_labels_of_the_pod_are_those_that_are_selected() -> None:
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels


def test_a_server_without_instances_is_not_ready_and_yet_alive() -> None:
    # It starts its instances again itself: to end it for their sake would cost every request its tokens.
    probes = {
        name: container()[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/live"}


def test_the_first_start_may_take_half_an_hour() -> None:
    probe = container()["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


def test_what_the_pod_mounts_is_defined_and_writable_by_its_user() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert mounts == {"state": HOME, "shm": "/dev/shm"}
    assert set(volumes) == set(mounts)
    assert (
        volumes["state"]["persistentVolumeClaim"]["claimName"]
        in manifests()["PersistentVolumeClaim"]["metadata"]["name"]
    )
    user = pod()["securityContext"]["runAsUser"]
    assert f"--uid {user} " in next(run for run in said("RUN") if "useradd" in run)
    assert pod()["securityContext"]["fsGroup"] == user


# --------------------------------------------------------------------------------------------- their flags


def words() -> dict[str, list[str]]:
    """The words after `serve` of each way to run it."""
    settings = yaml.safe_load(read("systemd/serve.yaml"))
    return {
        "compose": compose()["services"]["taichi"]["command"][1:],
        "kubernetes": container()["args"][1:],
        "systemd": [
            f"--{name}" if given is True else f"--{name}={given}" for name, given in settings.items()
        ],
    }


@pytest.mark.engine  # it imports vLLM, which takes seconds
@pytest.mark.parametrize("way", ["compose", "kubernetes", "systemd"])
def test_the_server_takes_the_flags(way: str) -> None:
    from taichi_serve.cluster.vllm.args import parse

    args = parse([re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words()[way]])
    assert (args.port, args.shutdown_timeout, args.metrics_without_key) == (8000, 60, True)
    assert args.model == "Qwen/Qwen2.5-7B-Instruct"


@pytest.mark.engine
def test_probes_need_no_key() -> None:
    from taichi_serve.frontend.keys import OPEN

    assert set(probed().values()) <= OPEN
