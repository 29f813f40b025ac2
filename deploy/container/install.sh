#!/usr/bin/env bash
# Turn a bare Debian into one that serves: Debian's packages, and a virtual environment with vLLM, NIXL and this
# package. The container file runs nothing else; `install.sh cpu .` also works in any fresh Debian root, as root.
#   install.sh cpu|cuda SOURCE [VENV]     SOURCE: a checkout, a wheel, or a requirement as pip takes it
set -euo pipefail

DEVICE=${1:?which device? cpu or cuda}
SOURCE=${2:?what is to be installed? a checkout, a wheel or a requirement}
VENV=${3:-/opt/taichi}

TORCH="torch==2.13.0+cpu" # as in scripts/setup.sh
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

case $DEVICE in
    cpu | cuda) ;;
    *)
        printf 'install.sh: %s is neither cpu nor cuda\n' "$DEVICE" >&2
        exit 2
        ;;
esac

# A compiler with Python's headers: without --enforce-eager vLLM compiles kernels when it starts. libnuma: its CPU
# kernels are linked against it.
PACKAGES=(ca-certificates g++ libnuma1 python3 python3-dev python3-venv)

export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_NO_CACHE_DIR=1
apt-get update
apt-get install --yes --no-install-recommends "${PACKAGES[@]}"

python3 -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip)

if [[ $DEVICE == cpu ]]; then
    # From the default index where it has the CPU build, else from PyTorch's own.
    "${PIP[@]}" install "$TORCH" || "${PIP[@]}" install --index-url "$TORCH_CPU_INDEX" "$TORCH"
fi
"${PIP[@]}" install "${SOURCE}[$DEVICE]"
if [[ $DEVICE == cpu ]]; then
    # They come as builds for CUDA and break `import transformers` beside this PyTorch; text models do not need them.
    "${PIP[@]}" uninstall --yes torchvision torchaudio torchcodec
fi

"$VENV/bin/taichi-serve" --version
