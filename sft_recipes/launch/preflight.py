"""Checks before any rank starts that PyTorch can use the GPUs that a plan needs on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from sft_recipes.launch import command
from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import cuda, env, timeouts


def check_gpus(plan: Plan) -> None:
    """Check that PyTorch can use the GPUs of this node that the plan needs.

    Raises:
        UserError: it cannot; with the cause and the fix.
    """
    if plan.uses_gpu:
        environment = command.environment(plan, os.environ)
        cuda.check(probe_torch(environment), plan.gpus // plan.nodes, environment)


def gpu_problem(needed: int) -> tuple[str, str] | None:
    """Return why PyTorch cannot use this number of GPUs on this machine, and the fix; None if it can."""
    if not needed:
        return None
    return cuda.find_problem(
        probe_torch(os.environ), needed, cuda.driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES")
    )


def probe_torch(environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """Return the report of `training/torch_probe.py`, run as a process since a launcher does not import PyTorch.

    Args:
        arguments: of that program (default: only what `runtime/cuda.py` needs).
    """
    command = [sys.executable, "-m", "sft_recipes.training.torch_probe", *(arguments or ("cuda",))]
    try:
        done = subprocess.run(
            command,
            env=env.with_repository(environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeouts.TORCH_PROBE,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeouts.TORCH_PROBE:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))
