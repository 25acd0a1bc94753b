#!/usr/bin/env bash
# Installs flash-attn into VENV, for GPUs outside the image: a wheel that is named, or the lock's source, compiled here.
#
#     requirements/flash-attn.sh VENV
#
# WHEEL=...     a wheel for this Python, torch and CUDA: a file, or a URL that ends in #sha256=<its hash>
# MAX_JOBS=...  compilations at once (default: a core each, as far as 8 GB of memory each are there)
# CUDA_ARCHITECTURES='8.6;9.0'   compute capabilities to compile for (default: those of the visible GPUs)
set -euo pipefail

die() { echo "error: $1" >&2; exit 2; }
[ $# -eq 1 ] || die "usage: flash-attn.sh VENV"
venv=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pip=("$venv/bin/python" -m pip install --quiet --no-deps)

if [ -n "${WHEEL:-}" ] && [ ! -f "$WHEEL" ]; then
    [[ $WHEEL =~ ^https:// ]] ||
        die "WHEEL: $WHEEL is no file and no https:// address; name a wheel for this Python, torch and CUDA"
    [[ $WHEEL =~ \#sha256=[0-9a-f]{64}$ ]] ||
        die "WHEEL: $WHEEL has no #sha256=<64 hexadecimal digits>, so nothing says what it is"
fi
[[ ${MAX_JOBS:-1} =~ ^[1-9][0-9]*$ ]] || die "MAX_JOBS: $MAX_JOBS is no number of compilations; wanted 1 or more"
"$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2> /dev/null ||
    die "make flash-attn: the torch in $venv is not built for CUDA; on a machine with an NVIDIA driver, TORCH=cuda make setup installs it"
if [ -n "${WHEEL:-}" ]; then
    "${pip[@]}" "$WHEEL"
else
    command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" > /dev/null ||
        die "make flash-attn: there is no nvcc to compile with; install the CUDA toolkit of torch's version or name it with CUDA_HOME, name a wheel with WHEEL=, or use the image (make image); without it model.attention=auto takes torch's own"
    capabilities=${CUDA_ARCHITECTURES:-}
    if [ -z "$capabilities" ]; then
        command -v nvidia-smi > /dev/null ||
            die "make flash-attn: there is no nvidia-smi to ask what to compile for; name it, as in CUDA_ARCHITECTURES=9.0"
        listed=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader) ||
            die "make flash-attn: nvidia-smi lists no GPU (${listed//$'\n'/ }); name what to compile for, as in CUDA_ARCHITECTURES=9.0"
        capabilities=$(sort -u <<< "$listed" | paste -sd ';')
    fi
    archs=$("$here/flash-attn-archs.sh" "$capabilities")
    cores=$(nproc) by_memory=$(($(awk '/MemAvailable/ { print $2 }' /proc/meminfo) / 8000000))
    jobs=${MAX_JOBS:-$((by_memory < 1 ? 1 : by_memory < cores ? by_memory : cores))}
    # flash-attn's own page: 3 to 5 minutes on 64 cores, for all of its architectures.
    echo "compiling flash-attn for $capabilities with $jobs jobs: about $((4 * 64 / jobs)) minutes by its authors' measurement (4 on 64 cores; not measured here)"
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

    print(f"flash-attn {flash_attn.__version__} is installed; not verified: no GPU is visible here. Run `make doctor` on a GPU")
    sys.exit()
if wrong := attention.wrong(attention.flash, "cuda", torch.bfloat16):
    sys.exit(f"error: flash-attn is installed and not fit to be used here: {wrong}; model.attention=auto passes it over")
print("flash-attn is installed, and gives on this GPU what attention is by its definition")
PYTHON
