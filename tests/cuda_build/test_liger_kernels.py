"""Liger's Triton kernels as the package uses them, interpreted on the CPU: their verification, and what layers keep."""

import json
import os
import subprocess
import sys

import pytest
from helpers.workplace import HELPERS, REPOSITORY

from sft_recipes.config.architecture import DENSE_KINDS
from sft_recipes.planner import memory


@pytest.fixture(scope="module")
def interpreted():
    """Return the results of liger_interpreter.py, a separate process: Triton selects its mode at import."""
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = HELPERS / "liger_interpreter.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_of_every_type_pass_verification(interpreted):
    assert interpreted["problems"] == {
        f"{kind}, {dtype}": None for kind in DENSE_KINDS for dtype in ("bfloat16", "float32")
    }
    assert interpreted["launches"] == ["_rms_norm_forward_kernel", "_swiglu_backward_kernel"]


def test_wrong_kernel_is_found_and_the_model_stays_as_it_was(interpreted):
    """An inverse root that is 5% too large."""
    assert interpreted["wrong"].startswith("relative error of ")
    assert interpreted["restored"].startswith("transformers.")


@pytest.mark.parametrize("case", ["zero2", "ddp"])
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_activations_equal_saved_tensors(interpreted, kind, case):
    kept, architecture, linear_layers, tokens = interpreted["kept"][f"{kind}, {case}"]
    planned = memory.MemoryInputs(
        architecture,
        case,
        precision="bf16",
        world_size=1,
        tokens=tokens,
        gradient_checkpointing=False,
        fused_kernels=True,
    )
    # Autocast's copies of the weights, which autograd also keeps, count as buffers.
    casts = 2 * sum(inputs * outputs for inputs, outputs in linear_layers.values()) / tokens if case == "ddp" else 0
    assert memory.activation_bytes(planned) == pytest.approx(kept - casts, rel=0.08)
