#!/usr/bin/env bash
# Makes VENV with the newest version of all that requirements.in names, whatever the lock says: what will break next.
#
#     requirements/latest.sh VENV        # `make test-latest` then runs the recipes' tests in it
#
# PyTorch is its newest CPU build; where that index cannot be reached, the locked version, said. Prints what differs from
# the lock.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: requirements/latest.sh VENV" >&2; exit 2; }
venv=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

rm -rf "$venv"
python3 -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Building deepspeed needs these beside torch.
pip install --quiet --upgrade pip setuptools wheel ninja
if ! pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch 2> /dev/null; then
    locked=$(grep -o '^torch==[0-9.]*' "$here/requirements.in")
    echo "latest.sh: PyTorch's CPU index cannot be reached; taking $locked"
    pip install --quiet "$locked"
fi
torch=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')

wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
sed -E 's/[[:space:]]*#.*//; s/(==|>=)[^ ;]*//; /^torch[[:space:]]*$/d; /^$/d' "$here/requirements.in" > "$wanted"
echo "torch==$torch" > "$wanted.torch"
pip install --quiet --no-build-isolation --constraint "$wanted.torch" --requirement "$wanted"
rm -f "$wanted.torch"

echo "latest.sh: newer than the lock:"
"$venv/bin/python" - "$here/requirements.in" <<'PYTHON'
import re
import sys
from importlib import metadata

for line in open(sys.argv[1], encoding="utf-8"):
    pinned = re.match(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line)
    if pinned and (here := metadata.version(pinned[1]).partition("+")[0]) != pinned[2].strip():
        print(f"  {pinned[1]} {pinned[2].strip()} -> {here}")
PYTHON
