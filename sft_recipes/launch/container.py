"""Run a command of the Makefile in a container or in the virtual environment of this checkout.

It runs in the machine's system Python, with the standard library only:

    python3 -I sft_recipes/launch/container.py VENV COMMAND [argument …]

It reads RUNTIME (`local`, `docker`, `podman`; if unset, a container is used when GPUs are requested and a container
runtime answers), GPUS, CUDA_VISIBLE_DEVICES, IMAGE, VARIANT (`cuda`, `cpu`), MOUNTS, CONTAINER_ARGS, BUILD_ARGS and
DRY_RUN.

Sources: https://docs.nvidia.com/deeplearning/frameworks/user-guide/index.html#setincshmem (shared memory, memlock and
stack limits), https://github.com/cncf-tags/container-device-interface (GPUs under podman).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # in a Python without this package installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft_recipes.launch import mounts
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY, hf_home
from sft_recipes.runtime.programs import run_program

# Commands that use the GPUs if the machine has them; the others need none.
_GPU_COMMANDS = ("train", "sanity", "verify-resume", "generate", "merge", "doctor", "smoke")
_CPU_BASE = "docker.io/library/ubuntu:24.04"  # the distribution of NVIDIA's images


def main(venv: str, command: str, arguments: list[str]) -> NoReturn:
    """Replace this process with the one that runs the command."""
    runtime = "" if os.environ.get("SFT_RECIPES_IMAGE") else _select_runtime(command)
    if not runtime:  # inside the image
        is_smoke_test = command == "smoke"
        line = ["bash", str(REPOSITORY / "docker" / "smoke.sh")] if is_smoke_test else _program("python", command)
        _replace_process([*line, *arguments])
    if runtime == "local":
        code = subprocess.run([str(REPOSITORY / "requirements" / "install.sh"), venv], check=False).returncode
        if code:
            sys.exit(code)
        _replace_process([*_program(f"{venv}/bin/python", command), *arguments])
    line = _build_command(runtime) if command == "image" else _run_command(runtime, command, arguments)
    if os.environ.get("DRY_RUN"):
        print(shlex.join(line))
        sys.exit(0)
    _replace_process(line)


def _program(python: str, command: str) -> list[str]:
    return [python, "-m", *(["tensorboard.main"] if command == "tensorboard" else ["sft_recipes", command])]


def _replace_process(command_line: list[str]) -> NoReturn:
    """Replace this process, so that the program receives the signals and its exit code is returned."""
    os.execvp(command_line[0], command_line)


def _select_runtime(command: str) -> str:
    """Return `local`, `docker` or `podman`."""
    requested, required = os.environ.get("RUNTIME", ""), command in ("image", "smoke")
    if requested in ("pyxis", "apptainer") and command not in _GPU_COMMANDS:
        return "local"  # the runtime of jobs, in a shell that has read slurm/cluster.env
    if requested not in ("", "local", "docker", "podman") or (requested == "local" and required):
        expected = f"{'' if required else 'local, '}docker or podman"
        raise SetupError(f"RUNTIME: found {requested!r}, expected {expected}; pyxis and apptainer are for jobs")
    requests_gpus = os.environ.get("GPUS", "") not in ("", "0")
    if requested == "local" or not (requested or required or (requests_gpus and _visible_gpus())):
        return "local"
    for runtime in [requested] if requested else ["docker", "podman"]:
        if _output([runtime, "info"]) is not None:
            return runtime
    if requested or required:
        raise SetupError(f"RUNTIME: {requested or 'docker or podman'} does not answer. Start it, or get access to it")
    print("running without a container: neither docker nor podman answers", file=sys.stderr, flush=True)
    return "local"


def _output(command_line: list[str]) -> str | None:
    """Return the standard output of a command; None if it fails or times out."""
    code, output = run_program(*command_line, timeout=timeouts.CONTAINER_RUNTIME)
    return None if code else output


def _extra_options(variable: str) -> list[str]:
    """Return the user's additional options of the container runtime."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise SetupError(f"{variable}: cannot split {os.environ[variable]!r} into arguments ({error})") from error


def _image(default: str) -> tuple[str, str]:
    """Return the variant, and the image's name."""
    variant = os.environ.get("VARIANT") or default
    if variant not in ("cuda", "cpu"):
        raise SetupError(f"VARIANT: found {variant!r}, expected cuda or cpu")
    return variant, os.environ.get("IMAGE") or f"localhost/sft-recipes:{variant}"


def _run_command(runtime: str, command: str, arguments: list[str]) -> list[str]:
    """Return the command line that runs the command in a container."""
    variant, image = _image("cuda" if _visible_gpus() else "cpu")
    image_id = _output([runtime, "image", "inspect", "--format", "{{.Id}}", image])
    if image_id is None:
        fix = f"Build it with `make image VARIANT={variant}`, pull it, or set RUNTIME=local"
        raise SetupError(f"IMAGE: {runtime} has no image {image}. {fix}")
    on_cpu = command not in _GPU_COMMANDS or (command == "smoke" and (variant == "cpu" or "--cpu" in arguments))
    count, visible = os.environ.get("GPUS", ""), [] if on_cpu else _visible_gpus()
    gpus = visible[: int(count)] if re.fullmatch(r"[0-9]+", count) else visible  # the command reports too few
    devices = f"GPUs {','.join(gpus)}" if gpus else "no GPU"
    print(f"container: {runtime}, {image}, {devices} (RUNTIME=local runs without)", file=sys.stderr, flush=True)
    limits, user = _limits_and_user(runtime)
    run = [
        runtime, "run", "--rm", "--ipc", "host", "--pids-limit", "-1", *_gpu_options(runtime, gpus),
        *(limits if gpus else []), "--read-only", "--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--stop-timeout", str(timeouts.CONTAINER_STOP),
        "--env", f"SFT_RECIPES_IMAGE={image} {image_id.strip()}",
    ]  # fmt: skip
    # `~` in overrides: the container has another home; `--dry-run`: what is printed runs the command.
    arguments = [re.sub(r"^([\w.-]+=)~(?=/)", rf"\1{Path.home()}", part) for part in arguments if part != "--dry-run"]
    if command == "smoke":  # of the image alone, as the image's user
        script = ["bash", "/opt/sft-recipes/docker/smoke.sh", *([] if gpus else ["--cpu"])]
        return [*run, "--network", "none", *_extra_options("CONTAINER_ARGS"), image, *script, *arguments]
    return [
        *run, *user,
        *(["--network", "host"] if command == "tensorboard" else []),  # it serves on the loopback of this machine
        *(["--interactive"] if command == "generate" and "--prompt" not in arguments else []),  # one prompt per line
        *(part for mount in mounts.volumes(arguments, not os.environ.get("DRY_RUN")) for part in ("--volume", mount)),
        *(part for name in mounts.passed_variables() for part in ("--env", name)),
        "--env", f"RUNS_DIR={mounts.runs_folder()}", "--env", f"HF_HOME={hf_home()}",
        "--env", f"PYTHONPATH={REPOSITORY}", "--env", f"SFT_RECIPES_REVISION={_revision()}",
        "--workdir", str(REPOSITORY), *_extra_options("CONTAINER_ARGS"), image, *_program("python", command),
        *arguments,
    ]  # fmt: skip


def _limits_and_user(runtime: str) -> tuple[list[str], list[str]]:
    """Return options for locked memory (GPUs, RDMA), and to run as the user, to whom written files then belong."""
    ids = ["--user", f"{os.geteuid()}:{os.getegid()}"]
    groups = [part for group in sorted({*os.getgroups()} - {os.getegid()}) for part in ("--group-add", str(group))]
    limits = ["--ulimit", "memlock=-1:-1", "--ulimit", "stack=67108864:67108864"]
    if runtime == "docker":
        if "rootless" in (_output(["docker", "info", "--format", "{{json .SecurityOptions}}"]) or ""):
            return [], ["--user", "0:0"]  # root in the container is the user on the host
        return limits, [*ids, *groups, "--userns", "host"]
    if os.geteuid() == 0:
        return limits, [*ids, *groups, "--security-opt", "label=disable"]
    keep_groups = ["--group-add", "keep-groups"] if "crun" in (_output(["podman", "info"]) or "") else []
    user = ["--userns", "keep-id", *ids, *keep_groups, "--security-opt", "label=disable"]
    return ["--ulimit", "host"], user  # without root podman cannot raise limits, only inherit them


def _visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this user may use."""
    listed = _output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]) or ""
    gpus = [line.strip() for line in listed.splitlines() if line.strip().isdigit()]
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if mask is None else [part for part in mask.split(",") if gpus and part and not part.startswith("-")]


def _gpu_options(runtime: str, gpus: list[str]) -> list[str]:
    if not gpus:
        return ["--env", "NVIDIA_VISIBLE_DEVICES=void"]  # a runtime may give every container all GPUs by default
    rdma = ["--device", "/dev/infiniband"] if Path("/dev/infiniband").is_dir() else []
    if runtime == "docker":
        return ["--gpus", f'"device={",".join(gpus)}"', *rdma]
    return [*(part for gpu in gpus for part in ("--device", f"nvidia.com/gpu={gpu}")), *rdma]


def _revision() -> str:
    """Return the commit of the code, with `-dirty` if the working tree differs from it."""
    commit = _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(REPOSITORY), "status", "--porcelain"])
    return f"{commit.strip()}{'-dirty' if changed else ''}" if commit else "unknown"


def _build_command(runtime: str) -> list[str]:
    """Return the command line that builds the image of the variant."""
    variant, image = _image("cuda")
    bases = [f"--build-arg={name}={_CPU_BASE}" for name in ("BUILDER_IMAGE", "BASE_IMAGE") if variant == "cpu"]
    return [
        runtime, "build", *(["--format", "docker"] if runtime == "podman" else []),  # podman's own has no SHELL
        "--file", str(REPOSITORY / "docker" / "Dockerfile"), "--tag", image,
        "--build-arg", f"TORCH={variant}", "--build-arg", f"REVISION={_revision()}", *bases,
        *_extra_options("BUILD_ARGS"), str(REPOSITORY),
    ]  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except SetupError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
