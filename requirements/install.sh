#!/usr/bin/env bash
# Makes the virtual environment VENV with exactly the locked packages. Needs no root.
#
#     requirements/install.sh VENV
#
# PYTHON=...       the Python to make it with, 3.11 or 3.12 (default: the first of
#                  python3, python3.11, python3.12 that is one). An existing VENV
#                  keeps its Python; delete it to change.
# TORCH=cpu|cuda   the PyTorch build (default: that of an existing VENV, else cuda
#                  if there is an NVIDIA driver)
#
# Every file must have a sha256 of the lock. The stamp VENV/.lock-<hash of the lock,
# the Python and TORCH> is written last. If it is there, a call returns at once; if
# another one is, the new lock is installed over the old; if VENV has none, an
# install was cut short and is done again from nothing.
set -euo pipefail

die() { echo "install.sh: $1" >&2; exit "${2:-2}"; }
[ $# -eq 1 ] && [ -n "$1" ] || die "usage: install.sh VENV"
venv=$1
lock=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unfinished=$venv/.lock-unfinished
index=https://download.pytorch.org/whl/cpu

stamp() { # the Python's resolved path stands for its version
    local sha256=sha256sum hash
    command -v sha256sum > /dev/null || sha256="shasum -a 256" # macOS
    hash=$({ echo "$torch $(readlink -f "$venv/bin/python")"; cat "$lock"/{common,cpu,cuda}.txt; } | $sha256)
    echo "$venv/.lock-${hash%% *}"
}
torch=${TORCH:-}
if [ -z "$torch" ]; then # login nodes without a driver and nodes with GPUs may share VENV, and jobs may be using it
    for torch in cpu cuda; do [ ! -e "$(stamp)" ] || exit 0; done
    torch=$(cat "$venv"/.lock-* 2> /dev/null | head -n 1 || true)
fi
if [ -z "$torch" ]; then
    torch=cpu
    if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L > /dev/null 2>&1; then torch=cuda; fi
fi
[ "$torch" = cpu ] || [ "$torch" = cuda ] || die "TORCH=$torch must be cpu or cuda"
[ ! -e "$(stamp)" ] || exit 0

mkdir -p "$venv"
exec 9< "$venv" # from here on, one call at a time
if command -v flock > /dev/null; then flock 9; fi
[ ! -e "$(stamp)" ] || exit 0
if [ -n "$(ls -A "$venv")" ] && [ ! -e "$unfinished" ] &&
    ! { [ -e "$venv/pyvenv.cfg" ] && compgen -G "$venv/.lock-*" > /dev/null; }; then
    die "$venv was not made by this script: name another place, or delete it"
fi

if [ -e "$unfinished" ] || ! "$venv/bin/python" -c 'import pip' 2> /dev/null; then
    set -- python3 python3.11 python3.12
    [ -z "${PYTHON:-}" ] || set -- "$PYTHON"
    python=
    for p; do
        [ -n "$python" ] || ! "$p" -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2> /dev/null || python=$p
    done
    [ -n "$python" ] || die "no Python 3.11 or 3.12 with its venv module among: $* (Debian: install python3-venv; elsewhere: name one with PYTHON=)"
    echo "$torch" > "$unfinished"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock-unfinished -exec rm -rf {} +
    "$python" -m venv "$venv"
fi
echo "$torch" > "$unfinished"
find "$venv" -maxdepth 1 -name '.lock-*' ! -name .lock-unfinished -delete
stamp=$(stamp)

pip() { "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }
# The lock names every dependency. pip would compile on one core, so that is done at the end.
get() { pip install --no-input --require-hashes --no-deps --no-compile "$@"; }

echo "Installing the locked packages into $venv: $("$venv/bin/python" -V), PyTorch for $torch; this takes some minutes"
temp=$(mktemp)
trap 'rm -f "$temp"' EXIT
# DeepSpeed is published as source: it is built with the locked setuptools and wheel,
# so these come first. Its operators are not compiled now but when first used.
awk '/^[a-z]/ { keep = /^(setuptools|wheel|packaging)==/ } keep' "$lock/common.txt" > "$temp"
get -r "$temp"
DS_BUILD_OPS=0 get --no-build-isolation -r "$lock/common.txt"

cuda=$torch
if [ "$torch" = cpu ] &&
    ! get --timeout 10 --retries 1 --extra-index-url "$index" -r "$lock/cpu.txt" > "$temp" 2>&1; then
    grep -q 'No matching distribution found' "$temp" || { cat "$temp" >&2; die "PyTorch was not installed" 1; }
    echo "No CPU build of PyTorch for this Python found ($index): taking PyPI's CUDA build, a download of 2.8 GB, which runs on the CPU too"
    cuda=cuda
fi
if [ "$cuda" = cuda ]; then
    # pip would take an installed 2.13.0+cpu for the 2.13.0 that cuda.txt names
    ! compgen -G "$venv/lib/python*/site-packages/torch-*+cpu.dist-info" > /dev/null || pip uninstall --yes torch
    get -r "$lock/cuda.txt"
fi
# Some packages carry files that are no Python of this version, which nobody imports.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
echo "$torch" > "$stamp"
rm "$unfinished"
