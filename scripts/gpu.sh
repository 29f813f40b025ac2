#!/usr/bin/env bash
# Runs a GPU check that has its GPUs to itself (scripts/h200.sh shares one GPU among several instances).
#   scripts/gpu.sh versus [out-dir] [options]   ours and stock vLLM, up on the same cards and loaded in turn (--help)
# vLLM and NIXL must be importable.
set -euo pipefail
cd "$(dirname "$0")/.."
check="${1:?which check? versus}"; shift
export PYTHONPATH="$PWD/src:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
exec python3 "scripts/gpu/$check.py" "$@"
