#!/usr/bin/env bash
# A folder of wheels, this checkout's and all that it needs without engines, from which a machine without a network
# installs `taichi`; with a second argument it is installed from there into a fresh virtual environment and tried.
#   wheels.sh FOLDER [VENV]     PYTHON: the interpreter to use; python3 where it is not set
set -euo pipefail
SOURCE=$(cd "$(dirname "$0")/.." && pwd)
FOLDER=${1:?which folder shall hold the wheels?}
VENV=${2:-}
PYTHON=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

"$PYTHON" -m pip wheel --quiet --wheel-dir "$FOLDER" "$SOURCE"
printf '%s wheels in %s\n' "$(find "$FOLDER" -name '*.whl' | wc -l)" "$FOLDER"
[[ -n $VENV ]] || exit 0

# Nothing but the folder: no index, and no other folder that pip may be configured with.
unset PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL PYTHONPATH
export PIP_CONFIG_FILE=/dev/null
"$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --no-index --find-links "$FOLDER" taichi-serve
"$VENV/bin/python" -m pip check
"$VENV/bin/taichi" --version

WORKLOAD=(--workload sharegpt --ttft-slo 4 --tpot-slo 0.07 --profile qwen2.5-14b-tp1-a100)
"$VENV/bin/taichi" simulate "${WORKLOAD[@]}" --p-heavy 1 --d-heavy 1 \
    --p-chunk 1024 --d-chunk 128 --rate 4 --requests 200
# Small, to see that it works: the best sliders need the defaults of --seconds, --most and --judging.
"$VENV/bin/taichi-serve" search "${WORKLOAD[@]}" --instances 2 --family aggregation --family disaggregation \
    --seconds 5 --most 100 --judging 0 --out "$VENV/best.yaml"
