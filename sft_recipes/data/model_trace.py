"""Traces the layers of a model without a closed form, for the forecasts of the plan; cached by architecture."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from sft_recipes.config import architecture as architectures
from sft_recipes.config import traced_layers
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.paths import REPOSITORY
from sft_recipes.runtime.run_dir import read_json


def needs_trace(architecture: Mapping[str, Any]) -> bool:
    """Return whether forecasts need a trace of this architecture that has not been tried."""
    known = not architecture or architectures.is_dense(architecture) or "model_type" not in architecture
    return not known and not architectures.find_trace(architecture) and not problem_of(architecture)


def problem_of(architecture: Mapping[str, Any]) -> str | None:
    """Return why an architecture could not be traced; None if it was traced, or not tried."""
    return read_json(traced_layers.cache_file(architecture)).get("problem") if architecture else None


def trace(architecture: Mapping[str, Any]) -> str | None:
    """Trace an architecture in a separate process, which imports torch and runs the model's code on fake tensors.

    Returns:
        Why it could not be traced; None on success.
    """
    file = traced_layers.cache_file(architecture).absolute()
    command = [sys.executable, "-m", "sft_recipes.training.layer_trace", str(file)]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=json.dumps(architecture).encode(), capture_output=True, env=environment,
            timeout=timeouts.LAYER_TRACE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeouts.LAYER_TRACE:g} seconds"
    return problem_of(architecture) or (f"exit code {done.returncode}" if done.returncode else None)
