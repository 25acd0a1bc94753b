"""Print as JSON what PyTorch finds on this machine: GPUs, compiled operators, flash attention.

With the argument `cuda`, print only the fields that `runtime/cuda.py` needs: no slower than importing PyTorch.
"""

import importlib.util
import json
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any


def probe_cuda() -> dict[str, Any]:
    """Return PyTorch's version, the CUDA version of its build (None for a CPU build), the number of GPUs that it can
    use, and its warning if it can use none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # device_count() alone is not enough: NVML also counts GPUs that the driver is too old to use.
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    warning = next((str(record.message).removeprefix("CUDA initialization: ") for record in caught), "")
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": devices, "warning": warning}


def probe() -> dict[str, Any]:
    """Return PyTorch's build, its GPUs, DeepSpeed's compiled operators, and the errors of flash attention."""
    import torch

    report = probe_cuda()
    spec = importlib.util.find_spec("deepspeed")
    operators = Path(spec.origin or "").parent.glob("ops/**/*_op*.so") if spec else []
    return {
        **report,
        "gpus": [
            {"capability": "{}.{}".format(*torch.cuda.get_device_capability(index))}
            for index in range(report["devices"])
        ],
        "operators": sorted(path.name.partition(".")[0] for path in operators),  # compiled when it was installed
        "compiler": shutil.which("c++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "flash_attention": probe_flash_attention() if report["devices"] else None,
    }


def probe_flash_attention() -> dict[str, Any]:
    """Return the errors of flash-attn's kernel on this GPU, or why it cannot run."""
    if importlib.util.find_spec("flash_attn") is None:
        return {"missing": "flash_attn is not installed"}
    import torch

    from sft_recipes.training import attention

    dtype = torch.bfloat16
    try:
        return {**attention.measure_errors(attention.flash, "cuda", dtype), "tolerance": attention.TOLERANCES[dtype]}
    except (ImportError, RuntimeError) as error:  # compiled for another torch, or for other GPUs
        return {"error": " ".join(str(error).split())[:200], "loads": not isinstance(error, ImportError)}


if __name__ == "__main__":
    print(json.dumps(probe_cuda() if sys.argv[1:] == ["cuda"] else probe()))
