#!/usr/bin/env bash
# The tests of several hosts, which are network namespaces of this machine with a raylet in each. Needs root and `ip`.
# Ray is no part of .venv: it comes into an environment of its own, which sees all that is in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT=${FLEET_LIMIT:-900}
VENV=build/fleet
PY=$VENV/bin/python

if [[ $(id -u) != 0 ]] || ! command -v ip >/dev/null; then
    echo "fleet: network namespaces need root and the command ip (iproute2); nothing was run" >&2
    exit 1
fi

wanted() { # what pyproject.toml says of an extra
    .venv/bin/python - "$1" <<'PYTHON'
import sys
import tomllib
from pathlib import Path

print(*tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
PYTHON
}

mapfile -t RAY < <(wanted ray)
if ! "$PY" -c 'import ray' >/dev/null 2>&1; then
    rm -rf "$VENV"
    .venv/bin/python -m venv "$VENV"
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/taichi.pth"
    "$PY" -m pip install --quiet --disable-pip-version-check "${RAY[@]}"
fi

export PYTHONPATH=$PWD/src
exec timeout --foreground --kill-after=30 "$LIMIT" \
    "$PY" -m pytest -m fleet --durations=10 --timeout=600 --session-timeout="$LIMIT" tests/fleet "$@"
