"""Compiles DeepSpeed's operators before they are needed, and keeps a rank killed meanwhile from blocking later starts.

torch guards a build by a file that is there; whoever is killed leaves it, and all others wait for its end for ever
(https://github.com/pytorch/pytorch/issues/189245). The kernel's own lock, which torch takes from its next release on
(https://github.com/pytorch/pytorch/pull/190543), goes with the process that held it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import SetupError


class HeldByTheKernel:
    """In place of torch.utils.file_baton.FileBaton: whoever has it builds, the others wait."""

    def __init__(self, lock_file_path: str, *_: object, **__: object):
        self._file = os.open(f"{lock_file_path}.held", os.O_RDWR | os.O_CREAT, 0o600)

    def try_acquire(self) -> bool:
        """Whether this process builds."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Until the process that builds has ended its build, or itself."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.release()

    def release(self) -> None:
        """Lets the others go on."""
        os.close(self._file)


def let_no_build_outlive_its_process() -> None:
    """Has torch build extensions under such a lock, in this process."""
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.FileBaton = HeldByTheKernel


def build_operators(plan: Plan) -> None:
    """Loads the operators that DeepSpeed needs for this plan, compiling those that are not built yet.

    DeepSpeed would build them while it loads the model or prepares the optimizer, and a failure would look like one of
    theirs.

    Raises:
        SetupError: an operator cannot be built, with the cause and what to install.
    """
    for builder in _operators(plan):
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            raise SetupError(
                f"parallelism: {plan.parallelism} needs DeepSpeed's operator {builder.name}, which cannot be compiled: "
                f"{_cause(error)}"
            ) from error


def _operators(plan: Plan) -> Iterator[Any]:
    """Builders of the plan's operators: the shared-memory all-reduce on CPUs, Adam on the CPU for offload."""
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    wanted = {
        "ShareMemCommBuilder": not plan.uses_gpu,
        "CPUAdamBuilder": plan.strategy.cpu_offload,
    }
    for name in (name for name, needed in wanted.items() if needed):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, True):
            yield builder


def _cause(error: Exception) -> str:
    """Why a build failed and the fix, in one line."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"found no C++ compiler ({compiler}). Install g++ and python3-dev, or set parallelism=ddp"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "found no Python headers (Python.h). Install python3-dev, or set parallelism=ddp"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
    return f"{reason[:300]}. Fix the compiler, or set parallelism=ddp"
