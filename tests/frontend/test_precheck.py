"""What a command line asks of the front end is tried before any instance is started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from building import arguments

from taichi_serve.frontend.precheck import precheck


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A key and a certificate for it that nobody else has signed."""
    here = tmp_path_factory.mktemp("tls")
    names = str(here / "key.pem"), str(here / "cert.pem")
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run([*words, "-keyout", names[0], "-out", names[1]], check=True, capture_output=True)
    return names


def test_an_ordinary_command_line_passes(certificate: tuple[str, str]) -> None:
    key, cert = certificate
    precheck(arguments())
    precheck(arguments("--ssl-keyfile", key, "--ssl-certfile", cert, "--ssl-ca-certs", cert))
    precheck(arguments("--middleware", "starlette.middleware.gzip.GZipMiddleware"))
    precheck(arguments("--enable-auto-tool-choice", "--tool-call-parser", "hermes"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--ssl-certfile /nowhere.pem", "--ssl-certfile"),
        (f"--ssl-certfile {__file__}", "--ssl-certfile"),
        (f"--ssl-keyfile {__file__}", "without a certificate"),
        ("--middleware nothing.Here", "No module named 'nothing'"),
        ("--middleware os.nothing", "--middleware"),
        ("--middleware Alone", "Alone must be module.Name"),
        ("--tool-call-parser mine", "no tool parser mine"),
        ("--enable-auto-tool-choice --tool-call-parser mine", "--tool-call-parser"),
        ("--tool-parser-plugin /nowhere.py", "there is no file /nowhere.py"),
        ("--reasoning-parser-plugin /nowhere.py", "there is no file /nowhere.py"),
        ('--allowed-origins "here"', "is not a JSON list"),
        ("--default-chat-template-kwargs 2", "is not a JSON object"),
        ("--uds /nowhere/socket", "there is no directory for /nowhere/socket"),
        ("--h11-max-header-count 0", "would let nothing in"),
    ],
)
def test_what_would_fail_after_minutes_is_said_at_once(words: str, says: str) -> None:
    args = arguments(*words.split())
    with pytest.raises(ValueError, match=says) as wrong:
        precheck(args)
    assert str(wrong.value).startswith("--")
    assert "\n" not in str(wrong.value)


def test_a_plugin_that_does_not_load_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("raise RuntimeError('broken')\n")
    assert plugin.is_file()
    with pytest.raises(ValueError, match=r"--tool-call-parser|--tool-parser-plugin"):
        precheck(arguments("--tool-parser-plugin", str(plugin), "--tool-call-parser", "from_the_plugin"))
