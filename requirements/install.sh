#!/usr/bin/env bash
# Creates the virtual environment VENV with exactly the locked packages. Needs no root.
#
#     requirements/install.sh VENV
#
# PYTHON=...       the Python to use, 3.11 or 3.12 (default: the first suitable of
#                  python3, python3.11, python3.12). An existing VENV keeps its
#                  Python; delete it to change.
# TORCH=cpu|cuda   the PyTorch build (default: that of an existing VENV, else cuda
#                  if there is an NVIDIA driver)
# COMPILE=no       write no bytecode: the caller does (docker/Dockerfile)
#
# Every file must have a sha256 of the lock. The stamp VENV/.lock-<hash of the lock,
# the Python and TORCH> is written last. If it exists, a call returns at once; if
# another one exists, the new lock is installed over the old; if VENV has none, an
# install was interrupted and starts from nothing.
set -euo pipefail

die() { echo "install.sh: $1" >&2; exit "${2:-2}"; }
[ $# -eq 1 ] && [ -n "$1" ] || die "usage: install.sh VENV"
venv=$1
lock=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unfinished=$venv/.lock-unfinished
index=https://download.pytorch.org/whl/cpu

stamp() { # the Python's resolved path identifies its version
    local sha256=sha256sum hash
    command -v sha256sum > /dev/null || sha256="shasum -a 256" # macOS
    hash=$({ echo "$torch $(readlink -f "$venv/bin/python")"; cat "$lock"/{common,cpu,cuda}.txt; } | $sha256)
    echo "$venv/.lock-${hash%% *}"
}
torch=${TORCH:-}
if [ -z "$torch" ]; then # login nodes without a driver and nodes with GPUs may share VENV, and jobs may use it
    for torch in cpu cuda; do [ ! -e "$(stamp)" ] || exit 0; done
    torch=$(cat "$venv"/.lock-* 2> /dev/null | head -n 1 || true)
fi
if [ -z "$torch" ]; then
    torch=cpu
    if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L > /dev/null 2>&1; then torch=cuda; fi
fi
[ "$torch" = cpu ] || [ "$torch" = cuda ] || die "TORCH: found $torch, expected cpu or cuda"
[ ! -e "$(stamp)" ] || exit 0

mkdir -p "$venv"
exec 9< "$venv" # one call at a time
if command -v flock > /dev/null; then flock 9; fi
[ ! -e "$(stamp)" ] || exit 0
if [ -n "$(ls -A "$venv")" ] && [ ! -e "$unfinished" ] &&
    ! { [ -e "$venv/pyvenv.cfg" ] && compgen -G "$venv/.lock-*" > /dev/null; }; then
    die "$venv was not created by this script. Use another folder, or delete it"
fi

if [ -e "$unfinished" ] || ! "$venv/bin/python" -c 'import pip' 2> /dev/null; then
    set -- python3 python3.11 python3.12
    [ -z "${PYTHON:-}" ] || set -- "$PYTHON"
    python=
    for p; do
        [ -n "$python" ] || ! "$p" -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2> /dev/null || python=$p
    done
    [ -n "$python" ] || die "found no Python 3.11 or 3.12 with its venv module among: $*. Install one (Debian: python3-venv), or set PYTHON="
    echo "$torch" > "$unfinished"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock-unfinished -exec rm -rf {} +
    "$python" -m venv "$venv"
fi
echo "$torch" > "$unfinished"
find "$venv" -maxdepth 1 -name '.lock-*' ! -name .lock-unfinished -delete
stamp=$(stamp)

pip() { "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }
# The lock has every dependency. pip would compile on one core; compileall does it at the end.
get() { pip install --no-input --require-hashes --no-deps --no-compile "$@"; }

echo "Installing the locked packages into $venv: $("$venv/bin/python" -V), PyTorch for $torch (some minutes)"
temp=$(mktemp)
trap 'rm -f "$temp"' EXIT
# DeepSpeed is published as source: it is built with the locked setuptools and wheel,
# so these come first. Its operators are compiled at their first use.
awk '/^[a-z]/ { keep = /^(setuptools|wheel|packaging)==/ } keep' "$lock/common.txt" > "$temp"
get -r "$temp"
DS_BUILD_OPS=0 get --no-build-isolation -r "$lock/common.txt"

cuda=$torch
if [ "$torch" = cpu ] &&
    ! get --timeout 10 --retries 1 --extra-index-url "$index" -r "$lock/cpu.txt" > "$temp" 2>&1; then
    grep -q 'No matching distribution found' "$temp" || { cat "$temp" >&2; die "cannot install PyTorch" 1; }
    echo "No CPU build of PyTorch for this Python found ($index): installing PyPI's CUDA build (2.8 GB), which also runs on the CPU"
    cuda=cuda
fi
if [ "$cuda" = cuda ]; then
    # pip would accept an installed 2.13.0+cpu as the 2.13.0 of cuda.txt
    ! compgen -G "$venv/lib/python*/site-packages/torch-*+cpu.dist-info" > /dev/null || pip uninstall --yes torch
    get -r "$lock/cuda.txt"
fi
# Without what a run imports little or nothing of, 40% of the time: tests, and transformers' hundreds of models. Some packages
# contain files for other Python versions, which are never imported.
[ "${COMPILE:-}" = no ] ||
    "$venv/bin/python" -m compileall -qq -j 0 -x '/site-packages/(.*/tests?/|transformers/models/(?!auto/))' "$venv/lib" || true
echo "$torch" > "$stamp"
rm "$unfinished"
