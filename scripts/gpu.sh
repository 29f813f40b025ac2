#!/usr/bin/env bash
# Runs a GPU check that has its GPUs to itself (scripts/h200.sh shares one GPU among several instances).
#   scripts/gpu.sh versus OUT [STAGE ...] [options]   ours and stock vLLM, up on the same cards and loaded in turn (--help)
# vLLM and NIXL must be importable. With --share N an MPS daemon is started unless one is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
check="${1:?which check? versus}"; shift
export PYTHONPATH="$PWD/src:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
share="$(printf '%s\n' "$@" | grep -A1 -x -- --share | tail -n 1 || true)"
if [ -n "$share" ]; then
  . scripts/gpu/mps.sh
  export CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="${CUDA_MPS_ACTIVE_THREAD_PERCENTAGE:-$((100 / share))}"
fi
exec "${PYTHON:-python3}" "scripts/gpu/$check.py" "$@"
