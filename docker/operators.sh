#!/usr/bin/env bash
# Compiles what the lock has as source alone: DeepSpeed's operators and, for CUDA, flash-attn. For the image's builder:
#
#     TORCH=cpu|cuda CUDA_ARCHITECTURES='8.0;9.0' docker/operators.sh VENV
set -euo pipefail

venv=$1
if [[ ! ${CUDA_ARCHITECTURES:-8.0} =~ ^[0-9]+\.[0-9]+(;[0-9]+\.[0-9]+)*$ ]]; then
    echo "error: CUDA_ARCHITECTURES: '$CUDA_ARCHITECTURES' is not a list of compute capabilities, such as 8.0;9.0" >&2
    exit 2
fi
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")/../requirements" && pwd)
CXX=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/portable-cxx
export CXX TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES:-8.0;9.0}
# DeepSpeed compiles one file after the other unless it is told; torch looks for ninja on the path.
export DS_ENABLE_NINJA=1 PATH=$venv/bin:$PATH
if [ -n "${MAX_JOBS:-}" ]; then export MAX_JOBS; else unset MAX_JOBS; fi

# Not from pip's cache: a wheel that was built without operators lies there.
build() {
    "$venv/bin/python" -m pip install --quiet --no-cache-dir --no-build-isolation --no-deps --require-hashes \
        --force-reinstall "$@"
}

lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
awk '/^[a-z]/ { keep = /^deepspeed==/ } keep' "$requirements/common.txt" > "$lock"
if [ "$TORCH" = cpu ]; then # what ZeRO wants; Adam for what a GPU has offloaded wants a GPU
    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 build -r "$lock"
    exit
fi
DS_ACCELERATOR=cuda DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 DS_BUILD_FUSED_ADAM=1 build -r "$lock"
if [ -n "${CUDA_ARCHITECTURES:-}" ]; then
    # flash-attn names architectures without the dot. Its own setup would take a wheel off the net, of no known hash.
    FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=${CUDA_ARCHITECTURES//./} \
        build -r "$requirements/flash-attn.txt"
fi
