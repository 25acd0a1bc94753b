#!/usr/bin/env bash
# Compiles the packages that the lock has as source only, in the builder of the image: DeepSpeed's operators and, for
# CUDA, flash-attn.
#
#     TORCH=cpu|cuda CUDA_ARCHITECTURES='8.0;9.0' docker/operators.sh VENV
#
# FLASH_ATTENTION_3=https://...#sha256=...   wheel of FlashAttention-3 for this Python, torch and CUDA, for Hopper GPUs
set -euo pipefail

venv=$1
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")/../requirements" && pwd)
if [ -n "${FLASH_ATTENTION_3:-}" ] && [[ ! $FLASH_ATTENTION_3 =~ ^https://.*\#sha256=[0-9a-f]{64}$ ]]; then
    echo "error: FLASH_ATTENTION_3: found $FLASH_ATTENTION_3, expected https://...#sha256=<64 hexadecimal digits>" >&2
    exit 2
fi
archs='' # before anything is compiled: a capability may be rejected
if [ "$TORCH" = cuda ] && [ -n "${CUDA_ARCHITECTURES:-}" ]; then
    archs=$("$requirements/flash-attn-archs.sh" "$CUDA_ARCHITECTURES")
fi
CXX=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/portable-cxx
export CXX TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES:-8.0;9.0}
# DeepSpeed compiles sequentially by default; torch finds ninja on PATH.
export DS_ENABLE_NINJA=1 PATH=$venv/bin:$PATH
if [ -n "${MAX_JOBS:-}" ]; then export MAX_JOBS; else unset MAX_JOBS; fi

# Not from pip's cache, which has a wheel without operators.
build() {
    "$venv/bin/python" -m pip install --quiet --no-cache-dir --no-build-isolation --no-deps --require-hashes --no-compile \
        --force-reinstall "$@"
}

lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
awk '/^[a-z]/ { keep = /^deepspeed==/ } keep' "$requirements/common.txt" > "$lock"
if [ "$TORCH" = cpu ]; then # the operator of ZeRO; the Adam for CPU offload needs a GPU
    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 build -r "$lock"
    exit
fi
DS_ACCELERATOR=cuda DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 DS_BUILD_FUSED_ADAM=1 build -r "$lock"
if [ -n "$archs" ]; then
    # Without FORCE_BUILD its setup.py would download a wheel of unknown hash.
    FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=$archs build -r "$requirements/flash-attn.txt"
fi
if [ -n "${FLASH_ATTENTION_3:-}" ]; then
    "$venv/bin/python" -m pip install --quiet --no-deps --no-compile "$FLASH_ATTENTION_3"
    "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("flash_attn_interface") is None)' ||
        { echo "error: FLASH_ATTENTION_3: $FLASH_ATTENTION_3 has no module flash_attn_interface" >&2; exit 2; }
fi
