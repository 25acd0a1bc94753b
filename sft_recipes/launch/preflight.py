"""Checks before any rank starts that PyTorch can use the GPUs that a plan needs on this machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from sft_recipes.launch import command
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import cuda, env, timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.programs import run_program


def check_gpus(plan: Plan) -> None:
    """Check that PyTorch can use the GPUs of this node that the plan needs.

    Raises:
        SetupError: it cannot; with the cause and the fix.
    """
    needed = plan.gpus // plan.nodes
    if problem := gpu_problem(needed, command.environment(plan, os.environ)):
        raise SetupError(f"GPUS: {needed} requested, but {problem[0]}. {problem[1]}")


def gpu_problem(needed: int, environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Return why PyTorch cannot use this number of GPUs on this machine, and the fix; None if it can.

    Args:
        environment: the variables of the processes that need the GPUs.
    """
    report = probe_torch(environment) if needed else {}
    if report.get("devices", 0) >= needed:
        return None
    return cuda.find_problem(report, needed, cuda.driver_version(), environment.get("CUDA_VISIBLE_DEVICES"))


def probe_torch(environment: Mapping[str, str], extent: str = "cuda") -> dict[str, Any]:
    """Return the report of `training/torch_probe.py`, run as a process since a launcher does not import PyTorch.

    Args:
        extent: `all`, or `cuda` for only what `runtime/cuda.py` needs.
    """
    probe = [sys.executable, "-m", "sft_recipes.training.torch_probe", extent]
    code, output = run_program(*probe, timeout=timeouts.TORCH_PROBE, environment=env.with_repository(environment))
    last = output.strip().rpartition("\n")[2]
    return {"error": last or "no message"} if code else dict(json.loads(last))
