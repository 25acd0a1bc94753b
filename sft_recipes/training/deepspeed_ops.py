"""Compiles the DeepSpeed operators of a plan before DeepSpeed needs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError


def build_operators(plan: Plan) -> None:
    """Load the operators that DeepSpeed needs for this plan; compile those that are not built yet.

    DeepSpeed would build them while it loads the model or prepares the optimizer, and a failure would look like theirs.

    Raises:
        SetupError: an operator cannot be built; with the cause and the fix.
    """
    for builder in _operators(plan):
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            raise SetupError(
                f"parallelism: {plan.parallelism} needs DeepSpeed's operator {builder.name}, which failed to compile: "
                f"{_cause(error)}"
            ) from error


def _operators(plan: Plan) -> Iterator[Any]:
    """Yield the builders: the shared-memory all-reduce on CPUs, CPU Adam for offload."""
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    needed = {
        "ShareMemCommBuilder": not plan.uses_gpu,
        "CPUAdamBuilder": plan.strategy.cpu_offload,
    }
    for name in (name for name, is_needed in needed.items() if is_needed):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, True):
            yield builder


def _cause(error: Exception) -> str:
    """Return the cause of a failed build and the fix, on one line."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"found no C++ compiler ({compiler}). Install g++ and python3-dev, or set parallelism=ddp"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "found no Python headers (Python.h). Install python3-dev, or set parallelism=ddp"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
    return f"{reason[:300]}. Fix the compiler, or set parallelism=ddp"
