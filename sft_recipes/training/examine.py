"""Looks at what torch finds on this machine, for `doctor`: GPUs, compiled operators, flash attention. Prints JSON."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any


def look() -> dict[str, Any]:
    """What there is: torch's build, its GPUs, DeepSpeed's operators, and whether flash attention is right."""
    import torch

    return {
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "operators": _operators(),
        "compiler": shutil.which("c++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "flash_attention": flash_attention() if torch.cuda.is_available() else None,
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
    print(json.dumps(look()))
