#!/usr/bin/env bash
# Maps compute capabilities to the architectures that flash-attn 2 can be built for, and prints the mapping.
#
#     requirements/flash-attn-archs.sh '8.6;9.0'    # stdout: 80;90; stderr: flash-attn: 8.6 -> sm_80, 9.0 -> sm_90
#
# flash-attn's setup.py knows 80, 90, 100 and 120 and silently drops every other value of FLASH_ATTN_CUDA_ARCHS. A cubin
# runs on GPUs of the same major version and the same or a higher minor version (CUDA C++ Programming Guide, "Binary
# Compatibility"), so one architecture per major version is enough.
set -euo pipefail

die() { echo "error: CUDA_ARCHITECTURES: $1" >&2; exit 2; }
[ $# -eq 1 ] || { echo "usage: flash-attn-archs.sh 'CAPABILITY;CAPABILITY...'" >&2; exit 2; }
[[ $1 =~ ^[0-9]+\.[0-9]+(\;[0-9]+\.[0-9]+)*$ ]] ||
    die "found '$1', expected compute capabilities separated by semicolons. Set CUDA_ARCHITECTURES='8.0;9.0'"

IFS=';' read -ra capabilities <<< "$1"
archs=() mapping=()
for capability in "${capabilities[@]}"; do
    case $capability in
        8.* | 9.* | 10.* | 12.*) arch=${capability%.*}0 ;;
        [0-7].*) die "flash-attn 2 needs Ampere or newer: found $capability, expected 8.0 or higher. Remove $capability from CUDA_ARCHITECTURES" ;;
        *) die "flash-attn 2 has no kernels for $capability, expected 8.x, 9.x, 10.x or 12.x. Remove $capability from CUDA_ARCHITECTURES" ;;
    esac
    mapping+=("$capability -> sm_$arch")
    [[ " ${archs[*]:-} " == *" $arch "* ]] || archs+=("$arch")
done
text=$(printf ', %s' "${mapping[@]}")
echo "flash-attn: ${text:2}" >&2
(IFS=';'; echo "${archs[*]}")
