"""Run a command of the Makefile in a container or in the virtual environment of this checkout.

It runs in the machine's system Python, with the standard library only:

    python3 -I sft_recipes/launch/container.py VENV COMMAND [argument …]

It reads RUNTIME (`local`, `docker`, `podman`; if unset, a container is used when GPUs are requested and a container
runtime answers), GPUS, DEVICES, IMAGE, VARIANT (`cuda`, `cpu`), MOUNTS, CONTAINER_ARGS, BUILD_ARGS, DRY_RUN.

Sources: https://docs.nvidia.com/deeplearning/frameworks/user-guide/index.html#setincshmem (shared memory, memlock and
stack limits), https://github.com/cncf-tags/container-device-interface (GPUs under podman).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # in a Python without this package installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft_recipes.launch import mounts
from sft_recipes.launch.mounts import InputError, option_value
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.paths import REPOSITORY, hf_home

CONTAINER_RUNTIMES = ("docker", "podman")
# Commands that use the GPUs if the machine has them; the others need none.
_GPU_COMMANDS = ("train", "sanity", "verify-resume", "generate", "merge", "doctor", "smoke")
# Passed by name, so that no value appears in a command line, which every user of the machine can read.
_PASSED = re.compile(
    r"(HF|HUGGING_FACE|HUGGINGFACE|NCCL|GLOO|TORCH_NCCL|CUDA|TRITON|DS|PYTORCH)_\w+|FLASH_ATTENTION_DETERMINISTIC|"
    r"(WANDB|CLEARML|CODECARBON|COMET|DAGSHUB|MLFLOW|NEPTUNE|SWANLAB|TRACKIO)_\w+|"
    r"OMP_NUM_THREADS|REPORT_TO|SANITY|GPU_HOUR_PRICE|NO_COLOR|COLUMNS|TERM|TZ|(https?|all|no)_proxy|"
    r"(HTTPS?|ALL|NO)_PROXY|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
)
# Not passed, because they describe the host: the runtime selects the GPUs, which are numbered from 0 in the container,
# and the image has its own CUDA. Variables of mounted folders (mounts.WRITTEN, mounts.READ) are passed nevertheless.
_HOST_ONLY = re.compile(
    r"CUDA_VISIBLE_DEVICES|CUDA_VERSION|PYTORCH_NVCC|(CUDA|TRITON|DS|PYTORCH)_(\w+_)?(HOME|ROOT|PATH|DIRS?|DIRECTORY)"
)
_CPU_BASE = "docker.io/library/ubuntu:24.04"  # the distribution of NVIDIA's images
_LABELLED = ("torch", "transformers", "trl", "accelerate", "deepspeed")


def main(venv: str, command: str, arguments: list[str]) -> NoReturn:
    """Replace this process with the one that runs the command."""
    dry_run = bool(os.environ.get("DRY_RUN")) or "--dry-run" in arguments
    if command == "image":
        _replace_process(_build_command(_build_runtime()), dry_run)
    if os.environ.get("SFT_RECIPES_IMAGE"):  # already inside the image
        if command == "smoke":
            os.execvp("bash", ["bash", str(REPOSITORY / "docker" / "smoke.sh"), *arguments])
        _run_locally("python", command, arguments)
    runtime = _select_runtime(command, arguments)
    if runtime == "local":
        if command == "smoke":
            raise InputError("RUNTIME: the smoke test runs in the image only. Set RUNTIME=docker or podman")
        install = [str(REPOSITORY / "requirements" / "install.sh"), venv]
        code = subprocess.run(install, check=False).returncode
        if code:
            sys.exit(code)
        _run_locally(f"{venv}/bin/python", command, arguments)
    _replace_process(_run_command(runtime, command, arguments, dry_run), dry_run)


def _run_locally(python: str, command: str, arguments: list[str]) -> NoReturn:
    os.execvp(python, [python, "-m", "sft_recipes", command, *arguments])


def _replace_process(command_line: list[str], dry_run: bool) -> NoReturn:
    """Replace this process with the runtime's client, which then receives the signals and returns the exit code."""
    if dry_run:
        print(shlex.join(command_line))
        sys.exit(0)
    os.execvp(command_line[0], command_line)


def _select_runtime(command: str, arguments: list[str]) -> str:
    """Return `local` or the container runtime."""
    requested = os.environ.get("RUNTIME", "")
    if requested in CONTAINER_RUNTIMES:
        return _checked_runtime(requested)
    if requested in ("pyxis", "apptainer") and command not in _GPU_COMMANDS:
        return "local"  # the runtime of jobs, in a shell that has read slurm/cluster.env
    if requested in ("pyxis", "apptainer"):
        raise InputError(
            f"RUNTIME: {requested} is for Slurm jobs only. Use sbatch slurm/RECIPE.sh, or set RUNTIME=local"
        )
    if requested not in ("", "local"):
        raise InputError(f"RUNTIME: found {requested!r}, expected local, {' or '.join(CONTAINER_RUNTIMES)}")
    needs_gpus = _option(arguments, "DEVICES") or _option(arguments, "GPUS") not in ("", "0")
    if requested == "local" or not (command == "smoke" or (needs_gpus and _visible_gpus())):
        return "local"
    runtime = _first_available_runtime()
    if runtime is None and command != "smoke":
        print("running without a container: neither docker nor podman answers", file=sys.stderr, flush=True)
    return runtime or "local"


def _build_runtime() -> str:
    """Return the container runtime to build an image with."""
    requested = os.environ.get("RUNTIME") or _first_available_runtime()
    if requested not in CONTAINER_RUNTIMES:
        raise InputError("RUNTIME: neither docker nor podman answers. Install one, or set RUNTIME=docker or podman")
    return _checked_runtime(requested)


def _first_available_runtime() -> str | None:
    available = (name for name in CONTAINER_RUNTIMES if shutil.which(name) and _answers(name))
    return next(map(_actual_runtime, available), None)


def _checked_runtime(name: str) -> str:
    if not shutil.which(name):
        raise InputError(f"RUNTIME: {name} is not installed. Install it, or set RUNTIME=local")
    if not _answers(name):
        raise InputError(
            f"RUNTIME: the {name} daemon does not answer. Start it, get permission to use it, or set RUNTIME=local"
        )
    return _actual_runtime(name)


def _actual_runtime(name: str) -> str:
    """Return which runtime a command is: `docker` may be podman (Debian's podman-docker)."""
    return "podman" if name == "docker" and "podman" in (_output(["docker", "--version"]) or "") else name


def _answers(runtime: str) -> bool:
    return _output([runtime, "info"]) is not None


def _output(command_line: list[str]) -> str | None:
    """Return the standard output of a command; None if it fails or times out."""
    try:
        done = subprocess.run(
            command_line, capture_output=True, text=True, check=False, timeout=timeouts.CONTAINER_RUNTIME
        )
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _option(arguments: list[str], variable: str) -> str:
    """Return GPUS or DEVICES: the command's option, or for a command without that option the variable of Make."""
    return option_value(arguments, f"--{variable.lower()}") or os.environ.get(variable, "")


def _extra_options(variable: str) -> list[str]:
    """Return the user's additional options of the container runtime."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise InputError(f"{variable}: cannot split {os.environ[variable]!r} into arguments ({error})") from error


def _variant(default: str | None = None) -> str:
    requested = os.environ.get("VARIANT", "")
    if requested not in ("", "cuda", "cpu"):
        raise InputError(f"VARIANT: found {requested!r}, expected cuda or cpu")
    return requested or default or ("cuda" if _visible_gpus() else "cpu")


def _image(variant: str) -> str:
    return os.environ.get("IMAGE") or f"localhost/sft-recipes:{variant}"


def _run_command(runtime: str, command: str, arguments: list[str], dry_run: bool) -> list[str]:
    """Return the command line that runs the command in a container."""
    variant = _variant()
    image = _image(variant)
    image_id = _output([runtime, "image", "inspect", "--format", "{{.Id}}", image])
    if image_id is None:
        raise InputError(
            f"IMAGE: {runtime} has no image {image}. Build it with `make image VARIANT={variant}`, pull it with "
            f"`{runtime} pull`, set IMAGE to another, or set RUNTIME=local"
        )
    on_cpu = command == "smoke" and (variant == "cpu" or "--cpu" in arguments)
    gpus = _select_gpus(arguments) if command in _GPU_COMMANDS and not on_cpu else []
    devices = f"GPUs {','.join(gpus)}" if gpus else "no GPU"
    print(f"container: {runtime}, {image}, {devices} (RUNTIME=local runs without)", file=sys.stderr, flush=True)
    run = [
        runtime, "run", "--rm", *_limits(runtime, gpus), *_gpu_options(runtime, gpus), *_rdma_options(gpus),
        "--read-only", "--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--stop-timeout", str(timeouts.CONTAINER_STOP),
        "--env", f"SFT_RECIPES_IMAGE={image} {image_id.strip()}", "--env", "ALLOW_SOCKETS",
    ]  # fmt: skip
    if command == "smoke":  # of the image alone, as the image's user
        arguments = [
            *_without_option(arguments, "--devices"), *(["--cpu"] if not gpus and "--cpu" not in arguments else []),
        ]  # fmt: skip
        script = ["bash", "/opt/sft-recipes/docker/smoke.sh"]
        return [*run, "--network", "none", *_extra_options("CONTAINER_ARGS"), image, *script, *arguments]
    # --dry-run prints this command line, so it is not part of it.
    arguments = [argument for argument in _renumber_devices(arguments, gpus) if argument != "--dry-run"]
    return [
        *run, *_user_options(runtime),
        *(["--network", "host"] if command == "tensorboard" else []),  # it serves on the loopback of this machine
        *(["--interactive"] if command == "generate" and "--prompt" not in arguments else []),  # one prompt per line
        *(part for mount in mounts.required(command, arguments, dry_run) for part in ("--volume", str(mount))),
        *(part for name in sorted(os.environ) if _is_passed(name) for part in ("--env", name)),
        "--env", f"RUNS_DIR={mounts.runs_folder()}", "--env", f"HF_HOME={hf_home()}",
        "--env", f"PYTHONPATH={REPOSITORY}",
        "--env", f"SFT_RECIPES_REVISION={_revision()}", "--workdir", str(REPOSITORY),
        *_extra_options("CONTAINER_ARGS"), image, "python", "-m", "sft_recipes", command, *map(_expand_home, arguments),
    ]  # fmt: skip


def _is_passed(variable: str) -> bool:
    """Whether the container gets the user's variable."""
    mounted = variable in (*mounts.WRITTEN, *mounts.READ)
    return bool(_PASSED.fullmatch(variable)) and (mounted or not _HOST_ONLY.fullmatch(variable))


def _limits(runtime: str, gpus: list[str]) -> list[str]:
    """Return options for shared memory (NCCL, data workers), processes, and locked memory (GPUs, RDMA)."""
    limits = ["--ipc", "host", "--pids-limit", "-1"]
    if runtime == "podman" and not Path("/run/systemd/system").is_dir():
        limits.append("--no-healthcheck")  # podman needs systemd for it
    if not gpus:
        return limits
    if runtime == "podman" and os.geteuid() != 0:  # without root it cannot raise limits, only inherit them
        return [*limits, "--ulimit", "host"]
    if runtime == "docker" and "rootless" in _docker_info("SecurityOptions"):
        return limits
    return [*limits, "--ulimit", "memlock=-1:-1", "--ulimit", "stack=67108864:67108864"]


def _user_options(runtime: str) -> list[str]:
    """Return options that run the container as the user, with the user's groups: files it writes belong to the user."""
    ids = ["--user", f"{os.geteuid()}:{os.getegid()}"]
    groups = [part for group in sorted({*os.getgroups()} - {os.getegid()}) for part in ("--group-add", str(group))]
    if runtime == "docker":
        options = _docker_info("SecurityOptions")
        if "rootless" in options:  # root in the container is the user on the host
            return ["--user", "0:0"]
        return [*ids, *groups, *(["--userns", "host"] if "userns" in options else [])]
    if os.geteuid() == 0:
        return [*ids, *groups, "--security-opt", "label=disable"]
    keep_groups = ["--group-add", "keep-groups"] if "crun" in (_output(["podman", "info"]) or "") else []
    return ["--userns", "keep-id", *ids, *keep_groups, "--security-opt", "label=disable"]


def _docker_info(field: str) -> str:
    return _output(["docker", "info", "--format", f"{{{{json .{field}}}}}"]) or ""


def _visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this user may use."""
    listed = _output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"])
    gpus = [line.strip() for line in (listed or "").splitlines() if line.strip().isdigit()]
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None or not gpus:
        return gpus
    ids = [part.strip() for part in mask.split(",")]
    first_invalid = next((index for index, id_ in enumerate(ids) if not id_ or id_.startswith("-")), len(ids))
    return ids[:first_invalid]  # CUDA's rule


def _select_gpus(arguments: list[str]) -> list[str]:
    """Return the GPUs of the container: DEVICES, the first GPUS of them, or all."""
    available, devices, count = _visible_gpus(), _option(arguments, "DEVICES"), _option(arguments, "GPUS")
    if devices:
        missing = [device for device in devices.split(",") if device not in available]
        if missing:
            listed = ", ".join(available) or "none"
            raise InputError(f"DEVICES: no GPU {', '.join(missing)} on this machine. Available: {listed}")
        return devices.split(",")
    if not re.fullmatch(r"[0-9]+", count):
        return available
    if int(count) > len(available):
        raise InputError(
            f"GPUS: {count} requested, but this machine has {len(available) or 'none'}. Set GPUS={len(available)}"
        )
    return available[: int(count)]


def _renumber_devices(arguments: list[str], gpus: list[str]) -> list[str]:
    """Replace `--devices` by `--gpus`: the container sees the selected GPUs only, numbered from 0."""
    if option_value(arguments, "--devices") is None:
        return arguments
    rest = _without_option(arguments, "--devices")
    return rest if option_value(rest, "--gpus") else [*rest[:1], "--gpus", str(len(gpus)), *rest[1:]]


def _without_option(arguments: list[str], option: str) -> list[str]:
    index = arguments.index(option) if option in arguments else len(arguments)
    return [*arguments[:index], *arguments[index + 2 :]]


def _expand_home(argument: str) -> str:
    """Expand `~` in an override: the container has another home."""
    if not re.match(r"[\w.-]+=", argument):
        return argument
    return re.sub(r"(?<=[=\[,'\" ])~(?=/)", lambda _: str(Path.home()), argument)


def _gpu_options(runtime: str, gpus: list[str]) -> list[str]:
    if not gpus:
        return ["--env", "NVIDIA_VISIBLE_DEVICES=void"]  # a runtime may give every container all GPUs by default
    if runtime == "docker" and '"nvidia"' in _docker_info("Runtimes"):
        return ["--gpus", f'"device={",".join(gpus)}"']
    if not _has_cdi(runtime):
        configure = "runtime configure --runtime=docker" if runtime == "docker" else "cdi generate"
        raise InputError(
            f"RUNTIME: {runtime} has no NVIDIA runtime and no CDI devices. Install the NVIDIA Container Toolkit "
            f"(1.17.8 or newer) and run `nvidia-ctk {configure}`, or set RUNTIME=local"
        )
    return [part for gpu in gpus for part in ("--device", f"nvidia.com/gpu={gpu}")]


def _has_cdi(runtime: str) -> bool:
    """Whether files describe NVIDIA's devices to the runtime (CDI)."""
    if runtime == "docker" and "nvidia.com/gpu" not in (_output(["docker", "info", "--format", "{{json .}}"]) or ""):
        return False
    return any(file for folder in ("/etc/cdi", "/var/run/cdi") for file in Path(folder).glob("*nvidia*"))


def _rdma_options(gpus: list[str]) -> list[str]:
    return ["--device", "/dev/infiniband"] if gpus and Path("/dev/infiniband").is_dir() else []


def _revision() -> str:
    """Return the commit of the code, with `-dirty` if the working tree differs from it."""
    commit = _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(REPOSITORY), "status", "--porcelain"])
    return f"{commit.strip()}{'-dirty' if changed else ''}" if commit else "unknown"


def _build_command(runtime: str) -> list[str]:
    """Return the command line that builds the image of the variant."""
    variant = _variant(default="cuda")
    bases = {"cpu": ["--build-arg", f"BUILDER_IMAGE={_CPU_BASE}", "--build-arg", f"BASE_IMAGE={_CPU_BASE}"], "cuda": []}
    locked = (REPOSITORY / "requirements" / "requirements.in").read_text(encoding="utf-8")
    pins = re.findall(r"^([\w-]+)==([\w.]+)", locked, re.MULTILINE)
    versions = [(name, version) for name, version in pins if name in _LABELLED]
    labels = [part for name, version in versions for part in ("--label", f"sft-recipes.version.{name}={version}")]
    build = {
        "podman": ["podman", "build", "--format", "docker"],  # podman's own image format has no health check
        "docker": ["env", "DOCKER_BUILDKIT=1", "docker", "build"],  # not the default before docker 23
    }
    return [
        *build[runtime], "--file", str(REPOSITORY / "docker" / "Dockerfile"), "--tag", _image(variant),
        "--build-arg", f"TORCH={variant}", "--build-arg", f"REVISION={_revision()}", *labels, *bases[variant],
        *_extra_options("BUILD_ARGS"), str(REPOSITORY),
    ]  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
