#!/usr/bin/env bash
# Runs one of the GPU checks on a machine with one large GPU, as several small ones under MPS.
#   scripts/h200.sh smoke [out-dir]     four instances, token identity, TTFT, TPOT and the gap of a move
#   scripts/h200.sh move [out-dir]      what a move costs, part by part, and what it costs everybody else
#   scripts/h200.sh measure [out-dir]   `taichi profile` of a 7B shape on a quarter of the GPU (alone and beside three), a 14B one on all of it
#   scripts/h200.sh structured [out-dir]  documents held by grammars, each moved three times and more: how many are identical
#   scripts/h200.sh prefix [out-dir] [stage ...]  prefixes fetched against computed, and conversations: blind, known, fetch, stock vLLM
#   scripts/h200.sh host [out-dir]      KV on the host: next turns with and without it, a peer that fetches from it, token identity
#   scripts/h200.sh goodput [out-dir]   three ways of serving, each tuned, on four instances (after `measure [out-dir] 7b-beside`)
# vLLM and NIXL must be importable. An MPS daemon is started unless one is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
check="${1:?which check? smoke, move, measure, structured, prefix, host or goodput}"; shift
export PYTHONPATH="$PWD/src:${PYTHONPATH:-}" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
. scripts/gpu/mps.sh
# A quarter of the streaming multiprocessors for each of four instances.
export CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="${CUDA_MPS_ACTIVE_THREAD_PERCENTAGE:-25}"
exec python3 "scripts/gpu/$check.py" "$@"
