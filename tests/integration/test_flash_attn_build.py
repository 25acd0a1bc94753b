"""The GPU architectures of both scripts that build flash-attn. Stub programs record their arguments; nothing is compiled."""

import os
import subprocess

import pytest
from helpers.workplace import REPOSITORY

MAP = REPOSITORY / "requirements" / "flash-attn-archs.sh"
OUTSIDE = REPOSITORY / "requirements" / "flash-attn.sh"
IMAGE = REPOSITORY / "docker" / "operators.sh"
PYTHON = """#!/bin/sh
case "$*" in
    *" pip install "*)
        echo "pip archs=$FLASH_ATTN_CUDA_ARCHS torch=$TORCH_CUDA_ARCH_LIST force=$FLASH_ATTENTION_FORCE_BUILD $*" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def build(tmp_path):
    """Run a build script with a virtual environment that records pip's calls, and with these GPUs."""

    def executable(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(script, gpus=None, **variables):
        executable("venv/bin/python", PYTHON)
        executable("programs/nvcc", "#!/bin/sh\n")
        if gpus is not None:
            executable("programs/nvidia-smi", f"#!/bin/sh\n{gpus}\n")
        calls = tmp_path / "calls"
        calls.touch()
        environment = {"PATH": f"{tmp_path}/programs:/usr/bin:/bin", "CALLS": str(calls), "MAX_JOBS": "2", **variables}
        done = subprocess.run(
            [script, tmp_path / "venv"], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        return done, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        ("8.0", "80"),
        ("8.6;8.9", "80"),
        ("8.9;9.0", "80;90"),
        ("10.3;12.1", "100;120"),
        ("9.0;8.7;10.0", "90;80;100"),
    ],
)
def test_capability_maps_to_architecture_of_its_major_version(capabilities, archs):
    done = subprocess.run([MAP, capabilities], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == archs
    for capability in capabilities.split(";"):
        assert f"{capability} -> sm_{capability.partition('.')[0]}0" in done.stderr


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [
        ("7.5", "flash-attn 2 needs Ampere or newer: found 7.5, expected 8.0 or higher"),
        ("8.0;7.0", "found 7.0, expected 8.0 or higher. Remove 7.0"),
        ("11.0", "no kernels for 11.0, expected 8.x, 9.x, 10.x or 12.x"),
        ("sm_90", "found 'sm_90', expected compute capabilities separated by semicolons"),
        ("8.0 9.0", "found '8.0 9.0'"),
        ("8.0;", "found '8.0;'"),
    ],
)
def test_unsupported_capability_is_rejected_before_compiling(build, capabilities, message):
    for script, variables in ((OUTSIDE, {}), (IMAGE, {"TORCH": "cuda"})):
        done, calls = build(script, CUDA_ARCHITECTURES=capabilities, **variables)
        assert done.returncode == 2 and calls == []
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: CUDA_ARCHITECTURES: ") and message in line


def test_local_build_uses_capabilities_of_visible_gpus(build):
    done, (call,) = build(OUTSIDE, gpus="printf '8.9\\n8.6\\n9.0\\n8.9\\n'")
    assert done.returncode == 0, done.stderr
    assert "archs=80;90 torch=8.6;8.9;9.0 force=TRUE" in call and "flash-attn.txt" in call
    assert "flash-attn: 8.6 -> sm_80, 8.9 -> sm_80, 9.0 -> sm_90" in done.stderr


def test_local_build_without_gpu_uses_cuda_architectures(build):
    """As on a login node; TORCH_CUDA_ARCH_LIST is set, without which torch fails with an IndexError there."""
    done, (call,) = build(OUTSIDE, CUDA_ARCHITECTURES="8.6")
    assert done.returncode == 0 and "archs=80 torch=8.6 " in call, done.stderr


def test_local_build_reports_nvidia_smi_without_gpus(build):
    done, calls = build(OUTSIDE, gpus="echo 'No devices were found'; exit 6")
    assert done.returncode == 2 and calls == []
    assert "nvidia-smi lists no GPU (No devices were found). Set CUDA_ARCHITECTURES" in done.stderr


def test_image_build_uses_cuda_architectures(build):
    done, (deepspeed, flash) = build(IMAGE, TORCH="cuda", CUDA_ARCHITECTURES="8.6;12.0")
    assert done.returncode == 0 and "flash-attn: 8.6 -> sm_80, 12.0 -> sm_120" in done.stderr
    assert "torch=8.6;12.0" in deepspeed and "archs= " in deepspeed
    assert "archs=80;120 torch=8.6;12.0 force=TRUE" in flash and "flash-attn.txt" in flash


@pytest.mark.parametrize("variables", [{"TORCH": "cuda", "CUDA_ARCHITECTURES": ""}, {"TORCH": "cpu"}])
def test_image_without_flash_attn_builds_deepspeed_only(build, variables):
    done, calls = build(IMAGE, **variables)
    assert done.returncode == 0 and len(calls) == 1 and "sm_" not in done.stderr
    assert "flash-attn.txt" not in calls[0]


def test_dockerfile_copies_every_script_it_runs():
    builder = (REPOSITORY / "docker" / "Dockerfile").read_text().partition("AS runtime")[0]
    copied = {path for line in builder.splitlines() if line.startswith("COPY ") for path in line.split()[1:]}
    assert {os.path.relpath(file, REPOSITORY) for file in (MAP, IMAGE)} <= copied
