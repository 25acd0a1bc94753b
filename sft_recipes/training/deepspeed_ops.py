"""Compiles the DeepSpeed operators of a plan before DeepSpeed needs them."""

import fcntl
import subprocess
from pathlib import Path

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError


def build_operators(plan: Plan) -> None:
    """Load the operators that DeepSpeed needs for this plan; compile those that are not built yet.

    DeepSpeed would build them while it loads the model or prepares the optimizer, and a failure would look like theirs.
    One process of a machine builds at a time. torch locks with a file, which a killed builder leaves; every later start
    would wait for it indefinitely (https://github.com/pytorch/pytorch/issues/189245, torch 2.13 and earlier).

    Raises:
        SetupError: an operator cannot be built.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    # The shared-memory all-reduce on CPUs, CPU Adam for offload.
    needed = {"ShareMemCommBuilder": not plan.uses_gpu, "CPUAdamBuilder": plan.strategy.cpu_offload}
    for name in (name for name, is_needed in needed.items() if is_needed):
        builder = get_accelerator().create_op_builder(name)
        if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, True):
            continue
        try:
            folder = Path(_get_build_directory(builder.name, False))
            with (folder / "lock.held").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when the process exits
                (folder / "lock").unlink(missing_ok=True)
                builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0])
            failure = f"DeepSpeed's operator {builder.name} failed to compile: {reason[:300]}"
            fix = "Install g++ and python3-dev, or set parallelism=ddp"
            raise SetupError(f"parallelism: {plan.parallelism}: {failure}. {fix}") from error
