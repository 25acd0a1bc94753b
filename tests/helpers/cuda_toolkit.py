"""CUDA's compiler as requirements/nvcc.txt installs it into the virtual environment, and what compilers need to find it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HOME = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
CUOBJDUMP = Path(sysconfig.get_path("purelib"), "triton", "backends", "nvidia", "bin", "cuobjdump")


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return variables under which every build takes this compiler, whatever else the machine has.

    Args:
        folder: gets the development link of libcudart, which the wheels lack.
    """
    link = folder / "libcudart.so"
    if not link.exists():
        (library,) = (HOME / "lib").glob("libcudart.so.*")
        link.symlink_to(library)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "TORCH_CUDA_"))}
    path = f"{HOME}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **kept, "CUDA_HOME": str(HOME), "PATH": path, "CPATH": f"{HOME}/include:{HOME}/include/cccl",
        "LIBRARY_PATH": str(folder), "MAX_JOBS": str(len(os.sched_getaffinity(0))), **variables,
    }  # fmt: skip


def architectures(library: Path) -> set[str]:
    """Return the GPU architectures that a library has machine code for, such as sm_90."""
    done = subprocess.run([CUOBJDUMP, "--list-elf", library], capture_output=True, text=True, check=True)
    return {part for line in done.stdout.splitlines() for part in line.split(".") if part.startswith("sm_")}
