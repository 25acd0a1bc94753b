"""TRL's Triton kernels of the loss (trl/kernels/chunked_logprob.py): compiled for every GPU architecture that the recipes
are planned for, without a GPU or a driver, and interpreted on the CPU against float64."""

import json
import os
import subprocess
import sys

import pytest
import triton
import trl.trainer.utils  # noqa: F401  before its kernels, which it imports
from helpers import cuda_toolkit
from helpers.workplace import HELPERS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl.kernels import chunked_logprob

INTEGERS = {"mm_stride", "vocab_start", "n_cols"}
POINTERS = {"mm_ptr": "*bf16", "targets_ptr": "*i64"}
# The options of the SFT loss, and all options of the kernels.
FORWARD = {"ENTROPY": True, "LOG_SUM_SQ_PROBS": False, "MEAN_LOGITS": False, "IS_TOP1": True, "SOFTCAP": False}
BACKWARD = {"LOGPROB_GRAD": True, "ENTROPY_GRAD": False, "SOFTCAP": False}
KERNELS = {
    "forward": (chunked_logprob._forward_kernel, FORWARD),
    "forward, all outputs": (chunked_logprob._forward_kernel, dict.fromkeys(FORWARD, True)),
    "backward": (chunked_logprob._backward_kernel, BACKWARD),
    "backward, all gradients": (chunked_logprob._backward_kernel, dict.fromkeys(BACKWARD, True)),
}


def source(kernel, flags):
    """Return the kernel with the types that its caller passes on a GPU."""
    constants = {f"HAS_{name}": value for name, value in flags.items()} | {"BLOCK_SIZE": chunked_logprob._BLOCK_SIZE}
    types = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
        elif parameter.name.endswith("_ptr"):
            types[parameter.name] = POINTERS.get(parameter.name, "*fp32")
        else:
            types[parameter.name] = "i32" if parameter.name in INTEGERS else "fp32"
    positions = {(index,): constants.pop(p.name) for index, p in enumerate(kernel.params) if p.is_constexpr}
    assert not constants, f"the kernel has no {constants}"
    return ASTSource(fn=kernel, signature=types, constexprs=positions)


@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("name", KERNELS)
def test_loss_kernels_compile_to_machine_code(name, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # without earlier builds
    compiled = triton.compile(source(*KERNELS[name]), target=GPUTarget("cuda", architecture, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    listed = subprocess.run([cuda_toolkit.CUOBJDUMP, "-elf", cubin], capture_output=True, text=True, check=True).stdout
    assert f"sm_{architecture}" in listed and KERNELS[name][0].__name__ in listed
    assert compiled.metadata.shared < 48 * 1024, "more shared memory than a block gets by default"


@pytest.fixture(scope="module")
def interpreted():
    """Return the results of triton_interpreter.py, a separate process: Triton selects its mode at import."""
    script = HELPERS / "triton_interpreter.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("both", ["1 gradients", "2 gradients"])
@pytest.mark.parametrize(
    ("case", "outputs", "gradients"),
    [
        ("float32, softcap None", 2e-5, 1e-5),
        ("float32, softcap 30.0", 2e-5, 1e-5),
        ("bfloat16, softcap None", 5e-2, 2e-2),  # the logits are rounded to 2^-8 of values up to about 6
    ],
)
def test_loss_kernels_match_float64(interpreted, case, both, outputs, gradients):
    result = interpreted[f"{case}, {both}"]
    assert result["launches"] == {"_forward_kernel": 3, "_backward_kernel": 3}, "three chunks of the vocabulary"
    errors = result["errors"]
    assert errors.pop("is_top1") == 0 and len(errors) == 6
    for name, error in errors.items():
        assert error < (gradients if name.startswith("gradient") else outputs), name
