#!/usr/bin/env bash
# Install the baselines of comparison.py, each in a separate virtual environment below FOLDER.
#
#     benchmarks/baselines/install.sh FOLDER
#
# LLaMA-Factory imports torchaudio, whose wheels on PyPI are built for CUDA, as torchvision's are: without a GPU the
# compiled part of torchaudio, which training on text never calls, and torchvision are removed.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: install.sh FOLDER" >&2; exit 2; }
torch=torch==2.13.0

for baseline in llamafactory==0.9.5 ms-swift==4.6.0; do
    place=$1/${baseline%%=*}
    [ ! -e "$place/installed" ] || continue
    python3 -m venv --clear "$place"
    "$place/bin/pip" install --quiet "$torch" "$baseline" tensorboard
    if [ "${baseline%%=*}" = llamafactory ] && [ ! -e /proc/driver/nvidia/version ]; then
        "$place/bin/pip" uninstall --quiet --yes torchvision
        "$place/bin/python" - <<'PYTHON'
import sysconfig
from pathlib import Path

for compiled in Path(sysconfig.get_path("purelib"), "torchaudio", "lib").glob("*.so"):
    compiled.unlink()
PYTHON
    fi
    touch "$place/installed"
done
