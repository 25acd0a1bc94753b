"""Compile DeepSpeed's operators as the image does, and flash-attn's sources with its setup.py, with nvcc from the package
index."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import cuda_toolkit
from helpers.workplace import REPOSITORY

VENV = Path(sys.prefix)
# Loads both extension modules without a GPU, and compares steps of CPU Adam with torch's AdamW.
LOAD = """
import importlib.util, pathlib, deepspeed, torch
folder = pathlib.Path(deepspeed.__file__).parent
def load(name):
    (file,) = folder.rglob(f"{name}.*so")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, file
fused, file = load("fused_adam_op")
assert callable(fused.multi_tensor_adam)
print(file)
adam, _ = load("cpu_adam_op")
torch.manual_seed(0)
weights, gradients = torch.randn(1000), torch.randn(1000)
deepspeed_weights, moments = weights.clone(), (torch.zeros(1000), torch.zeros(1000))
adam.create_adam(0, 1e-3, 0.9, 0.95, 1e-8, 0.1, True, False)
torch_weights = torch.nn.Parameter(weights.clone())
optimizer = torch.optim.AdamW([torch_weights], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
for step in (1, 2, 3):
    adam.adam_update(0, step, 1e-3, 0.9, 0.95, 1e-8, 0.1, True, deepspeed_weights, gradients, *moments)
    torch_weights.grad = gradients.clone()
    optimizer.step()
print(float((deepspeed_weights - torch_weights).abs().max()))
"""
# Runs flash-attn's setup.py with a few of its sources: flags, include paths and linking are those of a complete build.
SETUP = """
import runpy, sys
import torch.utils.cpp_extension as extension
build = extension.CUDAExtension
def chosen(name, sources, **named):
    kept = [source for source in sources if source in {kept}]
    assert len(kept) == {count}, sources
    return build(name, kept, **named)
extension.CUDAExtension = chosen
sys.argv[1:] = ["build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1] + "/temp"]
runpy.run_path("setup.py", run_name="__main__")
"""
# The C++ file that calls torch, and the forward kernel of causal attention in bf16 with the smallest head dimension, the
# fastest to compile of those that training uses.
SOURCES = ("csrc/flash_attn/flash_api.cpp", "csrc/flash_attn/src/flash_fwd_hdim32_bf16_causal_sm80.cu")


def run(command, folder, **variables):
    done = subprocess.run(
        [*map(str, command)],
        env=cuda_toolkit.environment(folder, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done


def test_nvcc_is_the_locked_version(tmp_path):
    environment = cuda_toolkit.environment(tmp_path)
    assert shutil.which("nvcc", path=environment["PATH"]) == str(cuda_toolkit.HOME / "bin" / "nvcc")
    locked = (REPOSITORY / "requirements" / "nvcc.txt").read_text()
    version = locked.partition("nvidia-cuda-nvcc==")[2].split()[0]
    assert f"V{version}" in run(["nvcc", "--version"], tmp_path).stdout
    program = "from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME)"
    assert run([sys.executable, "-c", program], tmp_path).stdout.strip() == str(cuda_toolkit.HOME)


def test_deepspeed_operators_compile_and_load(tmp_path):
    run([REPOSITORY / "docker" / "operators.sh", VENV], tmp_path, TORCH="cuda", CUDA_ARCHITECTURES="")
    file, error = run([sys.executable, "-c", LOAD], tmp_path, DS_ACCELERATOR="cpu").stdout.splitlines()[-2:]
    assert cuda_toolkit.architectures(Path(file)) == {"sm_80", "sm_90"}
    assert float(error) < 1e-6


@pytest.fixture(scope="module")
def flash_attn(tmp_path_factory):
    """Download and unpack the locked source of flash-attn; pip checks its hash."""
    folder = tmp_path_factory.mktemp("flash-attn")
    locked = REPOSITORY / "requirements" / "flash-attn.txt"
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--require-hashes",
    ]
    run([*download, "--dest", folder, "-r", locked], folder, FLASH_ATTENTION_SKIP_CUDA_BUILD="TRUE")
    (archive,) = folder.glob("flash_attn-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_flash_attn_compiles_for_the_mapped_architecture(flash_attn, tmp_path):
    """For an RTX 4090, whose own architecture flash-attn drops."""
    mapped = run([REPOSITORY / "requirements" / "flash-attn-archs.sh", "8.9"], tmp_path).stdout.strip()
    setup = tmp_path / "build.py"
    setup.write_text(SETUP.replace("{kept}", repr(SOURCES)).replace("{count}", str(len(SOURCES))))
    variables = {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "FLASH_ATTN_CUDA_ARCHS": mapped, "NVCC_THREADS": "1"}
    # No TORCH_CUDA_ARCH_LIST: flash-attn's flags must be enough without a visible GPU.
    run(["env", "-C", flash_attn, sys.executable, setup, tmp_path / "built"], tmp_path, **variables)
    (library,) = (tmp_path / "built").glob("flash_attn_2_cuda*.so")
    assert cuda_toolkit.architectures(library) == {"sm_80"}
