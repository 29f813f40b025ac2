# Sourced by the scripts whose instances share a GPU: an MPS daemon is there afterwards, the caller's, one that
# runs in our directory already, or a new one.
if [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/taichi-mps CUDA_MPS_LOG_DIRECTORY=/tmp/taichi-mps
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY"
  if ! kill -0 "$(cat "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid" 2>/dev/null)" 2>/dev/null; then
    PATH="$PATH:/usr/local/nvidia/bin" nvidia-cuda-mps-control -d
  fi
fi
