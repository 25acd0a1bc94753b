#!/usr/bin/env bash
# Writes common.txt and cuda.txt: exact versions, with the sha256 of every file, of
# the packages in requirements.in and their dependencies.
#
#     requirements/lock.sh             # after an edit of requirements.in
#     requirements/lock.sh --upgrade   # newest versions of the dependencies
#
# Needs uv (https://docs.astral.sh/uv) and the network. One resolution serves
# Python 3.11 and newer on every platform; markers say where a package applies.
# The versions and hashes already in the two files are kept while they satisfy
# requirements.in, so a second run changes nothing. cuda.txt has torch, the
# dependencies of its CUDA build (triton, nvidia-*, cuda-*) and Liger's Triton
# kernels, common.txt the rest.
# cpu.txt is written by hand: see its comment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

all=$(mktemp)
trap 'rm -f "$all"' EXIT
cat common.txt cuda.txt > "$all" 2>/dev/null || true

uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
    --generate-hashes --no-header --default-index https://pypi.org/simple \
    "$@" --output-file "$all" requirements.in

split() { # 1: torch and its CUDA part, 0: the rest
    echo "# Written by requirements/lock.sh from requirements.in. Do not edit."
    awk -v want="$1" '/^[a-z0-9]/ { cuda = /^(torch|triton|liger-kernel)==|^(nvidia|cuda)-/ } cuda == want' "$all"
}
split 0 > common.txt
split 1 > cuda.txt

torch=$(grep -o '^torch==[0-9.]*' requirements.in)
if grep -E '^torch==' cpu.txt | grep -vqE "^$torch(\+cpu)? "; then
    echo "lock.sh: cpu.txt is not for $torch; write its new version and hashes by hand" >&2
    exit 1
fi

uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
    --default-index https://pypi.org/simple "$@" --output-file docs.txt docs.in # for `make docs`
uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-deps \
    --default-index https://pypi.org/simple "$@" --output-file serve.txt serve.in # for `make serve`

# For `make eval`: the packages that common.txt and cuda.txt lack.
uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-header \
    --default-index https://pypi.org/simple "$@" --constraint common.txt --constraint cuda.txt --output-file "$all" eval.in
{
    echo "# Written by requirements/lock.sh from eval.in. Do not edit."
    awk 'FILENAME != ARGV[3] { locked[$0]; next } /^[a-z0-9]/ { keep = !($0 in locked) } keep' common.txt cuda.txt "$all"
} > eval.txt
