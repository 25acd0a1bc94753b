#!/usr/bin/env bash
# Installs flash-attn into VENV, for GPUs outside the image: the wheel WHEEL, or the locked source, compiled here.
#
#     requirements/flash-attn.sh VENV
#
# WHEEL=...     a wheel for this Python, torch and CUDA: a file, or a URL that ends in #sha256=<its hash>
# MAX_JOBS=...  parallel compilations (default: one per core, and per 8 GB of available memory)
# CUDA_ARCHITECTURES='8.6;9.0'   compute capabilities to compile for (default: those of the visible GPUs)
set -euo pipefail

die() { echo "error: $1" >&2; exit 2; }
[ $# -eq 1 ] || die "usage: flash-attn.sh VENV"
venv=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pip=("$venv/bin/python" -m pip install --quiet --no-deps)

if [ -n "${WHEEL:-}" ] && [ ! -f "$WHEEL" ]; then
    [[ $WHEEL =~ ^https:// ]] ||
        die "WHEEL: $WHEEL is not a file or an https:// URL. Set it to a wheel for this Python, torch and CUDA"
    [[ $WHEEL =~ \#sha256=[0-9a-f]{64}$ ]] ||
        die "WHEEL: $WHEEL has no hash. Append #sha256=<64 hexadecimal digits>"
fi
[[ ${MAX_JOBS:-1} =~ ^[1-9][0-9]*$ ]] || die "MAX_JOBS: found $MAX_JOBS, expected an integer of at least 1"
"$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2> /dev/null ||
    die "make flash-attn: $venv has a CPU build of torch, expected a CUDA build. Run TORCH=cuda make setup"
if [ -n "${WHEEL:-}" ]; then
    "${pip[@]}" "$WHEEL"
else
    command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" > /dev/null ||
        die "make flash-attn: nvcc not found. Install the CUDA toolkit of torch's version, set CUDA_HOME or WHEEL, or use the image (make image)"
    capabilities=${CUDA_ARCHITECTURES:-}
    if [ -z "$capabilities" ]; then
        command -v nvidia-smi > /dev/null ||
            die "make flash-attn: nvidia-smi not found. Set CUDA_ARCHITECTURES, for example to 9.0"
        listed=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader) ||
            die "make flash-attn: nvidia-smi lists no GPU (${listed//$'\n'/ }). Set CUDA_ARCHITECTURES, for example to 9.0"
        capabilities=$(sort -u <<< "$listed" | paste -sd ';')
    fi
    archs=$("$here/flash-attn-archs.sh" "$capabilities")
    cores=$(nproc) by_memory=$(($(awk '/MemAvailable/ { print $2 }' /proc/meminfo) / 8000000))
    jobs=${MAX_JOBS:-$((by_memory < 1 ? 1 : by_memory < cores ? by_memory : cores))}
    # flash-attn's README: 3 to 5 minutes on 64 cores, for all of its architectures.
    echo "compiling flash-attn for $capabilities with $jobs jobs: about $((4 * 64 / jobs)) minutes (estimated from 4 minutes on 64 cores in its README)"
    # torch's build helper fails with an IndexError if no GPU is visible and TORCH_CUDA_ARCH_LIST is unset.
    PATH=$PWD/$venv/bin:$venv/bin:$PATH MAX_JOBS=$jobs FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=$archs \
        TORCH_CUDA_ARCH_LIST=$capabilities "${pip[@]}" --no-build-isolation --require-hashes -r "$here/flash-attn.txt"
fi
"$venv/bin/python" - << 'PYTHON'
import sys

import torch
from sft_recipes.training import attention

if not torch.cuda.is_available():
    import flash_attn

    print(f"flash-attn {flash_attn.__version__} installed; not verified: no visible GPU. Run `make doctor` on a GPU")
    sys.exit()
if problem := attention.find_problem(attention.flash, "cuda", torch.bfloat16):
    sys.exit(f"error: flash-attn is installed but wrong on this GPU: {problem}. model.attention=auto does not use it")
print("flash-attn installed and verified on this GPU against reference attention")
PYTHON
