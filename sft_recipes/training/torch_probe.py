"""Prints as JSON what PyTorch finds on this machine: GPUs, compiled operators, flash attention.

With the argument `cuda` only what `runtime/cuda.py` needs, which takes no longer than the import of PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any


def cuda() -> dict[str, Any]:
    """Report PyTorch's version, the CUDA version of its build (None for a CPU build), the number of GPUs that it can
    use, and its warning if it can use none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The number of devices alone would not do: NVML counts them also where the driver is too old to use them.
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    warning = next((str(one.message).removeprefix("CUDA initialization: ") for one in caught), "")
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": devices, "warning": warning}


def look() -> dict[str, Any]:
    """What there is: torch's build, its GPUs, DeepSpeed's operators, and whether flash attention is right."""
    found = cuda()
    return {
        **found,
        "gpus": [_gpu(index) for index in range(found["devices"])],
        "operators": _operators(),
        "compiler": shutil.which("c++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "flash_attention": flash_attention() if found["devices"] else None,
    }


def flash_attention() -> dict[str, Any]:
    """How far flash-attn's kernel is off on this GPU, or why there is none."""
    if importlib.util.find_spec("flash_attn") is None:
        return {"missing": "flash_attn is not installed"}
    import torch

    from sft_recipes.training import attention

    dtype = torch.bfloat16
    try:
        return {**attention.errors(attention.flash, "cuda", dtype), "tolerance": attention.TOLERANCES[dtype]}
    except (ImportError, RuntimeError) as error:  # built for another torch, or for other GPUs
        return {"error": " ".join(str(error).split())[:200]}


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}", "free": free, "total": total,
    }  # fmt: skip


def _operators() -> list[str]:
    """DeepSpeed's operators that were compiled when it was installed."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        return []
    return sorted(path.name.partition(".")[0] for path in Path(found.origin).parent.glob("ops/**/*_op*.so"))


if __name__ == "__main__":
    print(json.dumps(cuda() if sys.argv[1:] == ["cuda"] else look()))
