"""Traces the layers of a model without a closed form, for the forecasts of the plan; cached by architecture."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from sft_recipes.config import architecture as architectures
from sft_recipes.config import traced_layers
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import read_json


def needs_trace(architecture: Mapping[str, Any], modes: Iterable[str]) -> bool:
    """Return whether forecasts need a trace of this architecture, in these modes, that has not been tried."""
    if not architecture or architectures.is_dense(architecture) or "model_type" not in architecture:
        return False
    return not problem_of(architecture) and not set(modes) <= traced_modes(architecture)


def traced_modes(architecture: Mapping[str, Any]) -> set[str]:
    """Return the modes in which an architecture has been traced."""
    return set((architectures.find_trace(architecture) or {}).get("modes", ()))


def problem_of(architecture: Mapping[str, Any]) -> str | None:
    """Return why an architecture could not be traced; None if it was traced, or not tried."""
    return read_json(traced_layers.cache_file(architecture)).get("problem") if architecture else None


def trace(architecture: Mapping[str, Any], modes: Iterable[str]) -> str | None:
    """Trace an architecture in a separate process, which imports torch and runs the model's code on fake tensors.

    Args:
        modes: those that a forecast needs (`memory.trace_modes`); those of an earlier trace are kept.

    Returns:
        Why it could not be traced; None on success.
    """
    file = traced_layers.cache_file(architecture).absolute()
    command = [sys.executable, "-m", "sft_recipes.training.layer_trace", str(file)]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    request = {"architecture": architecture, "modes": sorted({*modes, *traced_modes(architecture)})}
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, env=environment,
            timeout=timeouts.LAYER_TRACE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeouts.LAYER_TRACE:g} seconds"
    traced_layers.forget(architecture)
    return problem_of(architecture) or (f"exit code {done.returncode}" if done.returncode else None)
