#!/usr/bin/env bash
# Creates VENV with the newest versions of the packages in requirements.in, ignoring the lock: shows what will break next.
#
#     requirements/latest.sh VENV        # `make test-latest` then runs the recipes' tests in it
#
# PyTorch is its newest CPU build, or the locked version if that index is unreachable. Prints the differences from the
# lock.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: requirements/latest.sh VENV" >&2; exit 2; }
venv=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

rm -rf "$venv"
python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Building deepspeed needs these and torch.
pip install --quiet --upgrade pip setuptools wheel ninja
if ! pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch 2> /dev/null; then
    locked=$(grep -o '^torch==[0-9.]*' "$here/requirements.in")
    echo "latest.sh: PyTorch's CPU index is unreachable; installing $locked"
    pip install --quiet "$locked"
fi
torch=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')

unpinned=$(mktemp)
trap 'rm -f "$unpinned"' EXIT
sed -E 's/[[:space:]]*#.*//; s/(==|>=)[^ ;]*//; /^torch[[:space:]]*$/d; /^$/d' "$here/requirements.in" > "$unpinned"
echo "torch==$torch" > "$unpinned.torch"
pip install --quiet --no-build-isolation --constraint "$unpinned.torch" --requirement "$unpinned"
rm -f "$unpinned.torch"

echo "latest.sh: newer than the lock:"
"$venv/bin/python" - "$here/requirements.in" <<'PYTHON'
import re
import sys
from importlib import metadata

for line in open(sys.argv[1], encoding="utf-8"):
    pinned = re.match(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line)
    if pinned and (installed := metadata.version(pinned[1]).partition("+")[0]) != pinned[2].strip():
        print(f"  {pinned[1]} {pinned[2].strip()} -> {installed}")
PYTHON
