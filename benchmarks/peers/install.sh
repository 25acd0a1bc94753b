#!/usr/bin/env bash
# Installs what beside.py runs this project beside, each in an environment of its own below FOLDER.
#
#     benchmarks/peers/install.sh FOLDER
#
# LLaMA-Factory imports torchaudio, whose wheels on PyPI are built for CUDA, as torchvision's are: where there is no GPU
# the first loses its compiled part, which training on text never calls, and the second is left out.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: install.sh FOLDER" >&2; exit 2; }
torch=torch==2.13.0

for peer in llamafactory==0.9.5 ms-swift==4.6.0; do
    place=$1/${peer%%=*}
    [ ! -e "$place/installed" ] || continue
    python3 -m venv --clear "$place"
    "$place/bin/pip" install --quiet "$torch" "$peer" tensorboard
    if [ "${peer%%=*}" = llamafactory ] && [ ! -e /proc/driver/nvidia/version ]; then
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
