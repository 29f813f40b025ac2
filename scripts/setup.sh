#!/usr/bin/env bash
# Fill .venv with all that the demo and the tests need on a machine without a GPU: PyTorch and vLLM in their CPU
# builds, NIXL, this package and its development tools. `make setup` runs it; running it again is cheap.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0+cpu"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
VENV=.venv
LOG=.venv.log

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# step TITLE COMMAND...: one line on the screen with the seconds it took, everything else into the log.
step() {
    local title=$1 start=$SECONDS
    shift
    printf '  %-58s' "$title"
    if "$@" >>"$LOG" 2>&1; then
        printf '%4d s\n' $((SECONDS - start))
    else
        printf 'failed\n\n' >&2
        tail -n 20 "$LOG" >&2
        fail "'$*' failed; all of its output is in $LOG"
    fi
}

# ------------------------------------------------------------------------------- a Python that vLLM has wheels for

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        if supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

PYTHON_BIN=$(find_python) || fail "Python 3.11 to 3.14 is needed, and ${PYTHON:-python3 (also python3.11 to .14)} is not" \
    "one that works; install one and name it: make setup PYTHON=/path/to/python3"

# ------------------------------------------------------------------------------------------------ Debian's packages

# What the wheels do not bring along. No compiler: engines run with enforce_eager, which compiles nothing.
missing_packages() {
    "$PYTHON_BIN" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$PYTHON_BIN" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || echo libnuma1 # vLLM's kernels
}

install_packages() {
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
}

: >"$LOG"
mapfile -t missing < <(missing_packages)
if ((${#missing[@]})); then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        step "system packages: ${missing[*]}" install_packages "${missing[@]}"
    else
        fail "system packages are missing; run 'sudo apt-get install -y ${missing[*]}' and then this again"
    fi
fi

# ---------------------------------------------------------------------------------------------- virtual environment

if ! supported "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$VENV"
    step "virtual environment, $("$PYTHON_BIN" --version)" "$PYTHON_BIN" -m venv "$VENV"
fi
PY=$VENV/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# The versions stand in one place, the extra `cpu` of pyproject.toml. What is pinned there brings the rest of it along.
mapfile -t ENGINE < <("$PY" - <<'PY'
import tomllib
from pathlib import Path

extra = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]["cpu"]
print(*(one for one in extra if "==" in one), sep="\n")
PY
)

# installed NAME==VERSION...: whether exactly these are there.
installed() {
    "$PY" - "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    sys.exit(any(version(name) != wanted for name, wanted in (pin.split("==") for pin in sys.argv[1:])))
except PackageNotFoundError:
    sys.exit(1)
PY
}

# From the default index where it has the CPU build, else from PyTorch's own.
install_torch() {
    "$PY" -m pip install "$TORCH" || "$PY" -m pip install --index-url "$TORCH_CPU_INDEX" "$TORCH"
}

# vLLM asks for these three, and they come as builds for CUDA, which break `import transformers` beside a PyTorch
# without it. Text models do not need them.
remove_cuda_builds() {
    "$PY" -m pip uninstall --yes torchvision torchaudio torchcodec
}

installed "$TORCH" || step "$TORCH" install_torch
installed "${ENGINE[@]}" || step "${ENGINE[*]}" "$PY" -m pip install "${ENGINE[@]}"
step "taichi-serve and the development tools" "$PY" -m pip install --editable ".[dev]"
step "without torchvision, torchaudio, torchcodec" remove_cuda_builds
printf '  ready: %s\n' "$VENV"
