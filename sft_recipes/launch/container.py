"""Decides where a verb of the front door runs, in a container or in a virtual environment here, and runs it there.

It is run by the machine's own python, which has nothing but its standard library:

    python3 -I sft_recipes/launch/container.py VENV VERB [word …]

What it reads: RUNTIME (`local`, `docker`, `podman`; where it is not said, a container is taken when GPUs are asked for
and an engine is there), GPUS, DEVICES, IMAGE, VARIANT (`cuda`, `cpu`), MOUNTS, CONTAINER_ARGS, BUILD_ARGS, DRY_RUN.

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

if __name__ == "__main__":  # by a python that knows of no package here
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sft_recipes.launch import mounts
from sft_recipes.launch.mounts import REPOSITORY, InputError, value
from sft_recipes.runtime import timeouts

ENGINES = ("docker", "podman")
# Verbs that compute where there are GPUs; the others need none.
_COMPUTING = ("train", "sanity", "verify-resume", "generate", "merge", "doctor", "smoke")
# Passed by name, so that no value appears in a command line, which every user of the machine can read.
_PASSED = re.compile(
    r"(HF|HUGGING_FACE|HUGGINGFACE|NCCL|GLOO|TORCH_NCCL|CUDA|TRITON|DS|PYTORCH)_\w+|FLASH_ATTENTION_DETERMINISTIC|"
    r"(WANDB|CLEARML|CODECARBON|COMET|DAGSHUB|MLFLOW|NEPTUNE|SWANLAB|TRACKIO)_\w+|"
    r"OMP_NUM_THREADS|REPORT_TO|SANITY|GPU_HOUR_PRICE|NO_COLOR|COLUMNS|TERM|TZ|(https?|all|no)_proxy|"
    r"(HTTPS?|ALL|NO)_PROXY|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
)
# Not passed, because they describe the host: the engine selects the GPUs, which the container numbers from 0, and the
# image has its own CUDA. Folders that are mounted (mounts.WRITTEN, mounts.READ) are passed all the same.
_OF_THE_HOST = re.compile(
    r"CUDA_VISIBLE_DEVICES|CUDA_VERSION|PYTORCH_NVCC|(CUDA|TRITON|DS|PYTORCH)_(\w+_)?(HOME|ROOT|PATH|DIRS?|DIRECTORY)"
)
# A stop waits for a save, which of a large model takes minutes; engines' own 10 seconds would cut it off.
_CPU_BASE = "docker.io/library/ubuntu:24.04"  # the distribution of NVIDIA's own images
_LABELLED = ("torch", "transformers", "trl", "accelerate", "deepspeed")


def main(venv: str, verb: str, words: list[str]) -> NoReturn:
    """Becomes the process that carries out the verb."""
    dry = bool(os.environ.get("DRY_RUN")) or "--dry-run" in words
    if verb == "image":
        _become(_build(_engine_asked_for()), dry)
    if os.environ.get("SFT_RECIPES_IMAGE"):  # inside of it already
        if verb == "smoke":
            os.execvp("bash", ["bash", str(REPOSITORY / "docker" / "smoke.sh"), *words])
        _here("python", verb, words)
    runtime = _runtime(verb, words)
    if runtime == "local":
        if verb == "smoke":
            raise InputError("RUNTIME: the smoke test is the image's; say RUNTIME=docker or podman where one answers")
        install = [str(REPOSITORY / "requirements" / "install.sh"), venv]
        code = subprocess.run(install, check=False).returncode
        if code:
            sys.exit(code)
        _here(f"{venv}/bin/python", verb, words)
    _become(_command(runtime, verb, words, dry), dry)


def _here(python: str, verb: str, words: list[str]) -> NoReturn:
    os.execvp(python, [python, "-m", "sft_recipes", verb, *words])


def _become(command: list[str], dry: bool) -> NoReturn:
    """The engine's client takes this process's place: signals and the exit code are its own then."""
    if dry:
        print(shlex.join(command))
        sys.exit(0)
    os.execvp(command[0], command)


def _runtime(verb: str, words: list[str]) -> str:
    """Where it runs: `local`, or the engine."""
    asked = os.environ.get("RUNTIME", "")
    if asked in ENGINES:
        return _answering(asked)
    if asked in ("pyxis", "apptainer") and verb not in _COMPUTING:
        return "local"  # a job's runtime, in a shell that has read slurm/cluster.env
    if asked in ("pyxis", "apptainer"):
        raise InputError(
            f"RUNTIME: {asked} starts a Slurm job's image, and this is none: sbatch slurm/RECIPE.sh, or RUNTIME=local"
        )
    if asked not in ("", "local"):
        raise InputError(f"RUNTIME: {asked!r} is not known; say local, {' or '.join(ENGINES)}")
    wants_gpus = _asked(words, "DEVICES") or _asked(words, "GPUS") not in ("", "0")
    if asked == "local" or not (verb == "smoke" or (wants_gpus and _gpus())):
        return "local"
    engine = _first_that_answers()
    if engine is None and verb != "smoke":
        print("without a container: neither docker nor podman answers here", file=sys.stderr, flush=True)
    return engine or "local"


def _engine_asked_for() -> str:
    """The engine to build an image with."""
    asked = os.environ.get("RUNTIME") or _first_that_answers()
    if asked not in ENGINES:
        raise InputError("RUNTIME: neither docker nor podman answers here; install one, or say which: RUNTIME=podman")
    return _answering(asked)


def _first_that_answers() -> str | None:
    return next((_engine(one) for one in ENGINES if shutil.which(one) and _answers(one)), None)


def _answering(engine: str) -> str:
    if not shutil.which(engine):
        raise InputError(f"RUNTIME: there is no {engine} here; install it, or RUNTIME=local")
    if not _answers(engine):
        raise InputError(
            f"RUNTIME: {engine} is here, but its daemon does not answer; start it, be let use it, or RUNTIME=local"
        )
    return _engine(engine)


def _engine(name: str) -> str:
    """What a command is: `docker` may be podman's (Debian's podman-docker)."""
    return "podman" if name == "docker" and "podman" in (_ask(["docker", "--version"]) or "") else name


def _answers(engine: str) -> bool:
    return _ask([engine, "info"]) is not None


def _ask(command: list[str]) -> str | None:
    """What a command says; None where it fails, or says nothing for a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeouts.CONTAINER_ENGINE)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _asked(words: list[str], variable: str) -> str:
    """GPUS or DEVICES: as an option of the verb, or for a verb that has none as Make exports it."""
    return value(words, f"--{variable.lower()}") or os.environ.get(variable, "")


def _more(variable: str) -> list[str]:
    """Options of the engine that the user adds."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise InputError(f"{variable}: {os.environ[variable]!r} cannot be read as words ({error})") from error


def _variant(default: str | None = None) -> str:
    asked = os.environ.get("VARIANT", "")
    if asked not in ("", "cuda", "cpu"):
        raise InputError(f"VARIANT: {asked!r} is not known; say cuda or cpu")
    return asked or default or ("cuda" if _gpus() else "cpu")


def _image(variant: str) -> str:
    return os.environ.get("IMAGE") or f"localhost/sft-recipes:{variant}"


def _command(engine: str, verb: str, words: list[str], dry: bool) -> list[str]:
    """The whole command that carries out the verb in a container."""
    variant = _variant()
    image = _image(variant)
    found = _ask([engine, "image", "inspect", "--format", "{{.Id}}", image])
    if found is None:
        raise InputError(
            f"IMAGE: {engine} has no image {image}; build it with `make image VARIANT={variant}`, fetch it with "
            f"`{engine} pull`, name another with IMAGE=, or run without a container: RUNTIME=local"
        )
    on_cpu = verb == "smoke" and (variant == "cpu" or "--cpu" in words)
    gpus = _devices(words) if verb in _COMPUTING and not on_cpu else []
    seen = f"GPUs {','.join(gpus)}" if gpus else "no GPU"
    print(f"in a container: {engine}, {image}, {seen} (RUNTIME=local runs without)", file=sys.stderr, flush=True)
    command = [
        engine, "run", "--rm", *_limits(engine, gpus), *_gpu_access(engine, gpus), *_fabric(gpus),
        "--read-only", "--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--stop-timeout", str(timeouts.CONTAINER_STOP),
        "--env", f"SFT_RECIPES_IMAGE={image} {found.strip()}", "--env", "ALLOW_SOCKETS",
    ]  # fmt: skip
    if verb == "smoke":  # of the image alone, as the user that it names
        words = [*_without(words, "--devices"), *(["--cpu"] if not gpus and "--cpu" not in words else [])]
        script = ["bash", "/opt/sft-recipes/docker/smoke.sh"]
        return [*command, "--network", "none", *_more("CONTAINER_ARGS"), image, *script, *words]
    words = [word for word in _renumbered(words, gpus) if word != "--dry-run"]  # what is printed is this command
    return [
        *command, *_as_user(engine),
        *(["--network", "host"] if verb == "tensorboard" else []),  # it serves on this machine's own loopback
        *(["--interactive"] if verb == "generate" and "--prompt" not in words else []),  # prompts, a line each
        *(part for mount in mounts.needed(verb, words, dry) for part in ("--volume", str(mount))),
        *(part for name in sorted(os.environ) if _is_passed(name) for part in ("--env", name)),
        "--env", f"RUNS_DIR={mounts.runs()}", "--env", f"HF_HOME={mounts.hub()}", "--env", f"PYTHONPATH={REPOSITORY}",
        "--env", f"SFT_RECIPES_REVISION={_revision()}", "--workdir", str(REPOSITORY),
        *_more("CONTAINER_ARGS"), image, "python", "-m", "sft_recipes", verb, *map(_with_home, words),
    ]  # fmt: skip


def _is_passed(variable: str) -> bool:
    """Whether the container gets the user's variable."""
    mounted = variable in (*mounts.WRITTEN, *mounts.READ)
    return bool(_PASSED.fullmatch(variable)) and (mounted or not _OF_THE_HOST.fullmatch(variable))


def _limits(engine: str, gpus: list[str]) -> list[str]:
    """Shared memory for NCCL and data workers, processes as many as the machine has, and with GPUs the locked memory
    that they and RDMA need."""
    limits = ["--ipc", "host", "--pids-limit", "-1"]
    if engine == "podman" and not Path("/run/systemd/system").is_dir():
        limits.append("--no-healthcheck")  # podman has systemd carry it out
    if not gpus:
        return limits
    if engine == "podman" and os.geteuid() != 0:  # who may not raise a limit takes over those that are
        return [*limits, "--ulimit", "host"]
    if engine == "docker" and "rootless" in _of_docker("SecurityOptions"):
        return limits
    return [*limits, "--ulimit", "memlock=-1:-1", "--ulimit", "stack=67108864:67108864"]


def _as_user(engine: str) -> list[str]:
    """Whatever is written belongs to the user, who may read there what his groups may."""
    ids = ["--user", f"{os.geteuid()}:{os.getegid()}"]
    groups = [part for one in sorted({*os.getgroups()} - {os.getegid()}) for part in ("--group-add", str(one))]
    if engine == "docker":
        options = _of_docker("SecurityOptions")
        if "rootless" in options:  # root in there is the user out here
            return ["--user", "0:0"]
        return [*ids, *groups, *(["--userns", "host"] if "userns" in options else [])]
    if os.geteuid() == 0:
        return [*ids, *groups, "--security-opt", "label=disable"]
    kept = ["--group-add", "keep-groups"] if "crun" in (_ask(["podman", "info"]) or "") else []
    return ["--userns", "keep-id", *ids, *kept, "--security-opt", "label=disable"]


def _of_docker(field: str) -> str:
    """What docker tells of itself."""
    return _ask(["docker", "info", "--format", f"{{{{json .{field}}}}}"]) or ""


def _gpus() -> list[str]:
    """The ids of the GPUs that this user may use."""
    listed = _ask(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"])
    here = [line.strip() for line in (listed or "").splitlines() if line.strip().isdigit()]
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if masked is None or not here:
        return here
    named = [one.strip() for one in masked.split(",")]
    first_wrong = next((at for at, one in enumerate(named) if not one or one.startswith("-")), len(named))
    return named[:first_wrong]  # as CUDA reads it


def _devices(words: list[str]) -> list[str]:
    """The GPUs that the container gets: those named, as many as asked for, or all."""
    here, named, count = _gpus(), _asked(words, "DEVICES"), _asked(words, "GPUS")
    if named:
        missing = [one for one in named.split(",") if one not in here]
        if missing:
            raise InputError(f"DEVICES: no GPU {', '.join(missing)} here; there are: {', '.join(here) or 'none'}")
        return named.split(",")
    if not re.fullmatch(r"[0-9]+", count):
        return here
    if int(count) > len(here):
        raise InputError(f"GPUS: {count} asked for, but this machine has {len(here) or 'none'}; say GPUS={len(here)}")
    return here[: int(count)]


def _renumbered(words: list[str], gpus: list[str]) -> list[str]:
    """Inside, the GPUs that were named are all there are, and numbered from 0."""
    if value(words, "--devices") is None:
        return words
    rest = _without(words, "--devices")
    return rest if value(rest, "--gpus") else [*rest[:1], "--gpus", str(len(gpus)), *rest[1:]]


def _without(words: list[str], option: str) -> list[str]:
    at = words.index(option) if option in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def _with_home(word: str) -> str:
    """An override with `~` spelled out, which in a container is another place."""
    if not re.match(r"[\w.-]+=", word):
        return word
    return re.sub(r"(?<=[=\[,'\" ])~(?=/)", lambda _: str(Path.home()), word)


def _gpu_access(engine: str, gpus: list[str]) -> list[str]:
    if not gpus:
        return ["--env", "NVIDIA_VISIBLE_DEVICES=void"]  # where every container of an engine would get them
    if engine == "docker" and '"nvidia"' in _of_docker("Runtimes"):
        return ["--gpus", f'"device={",".join(gpus)}"']
    if not _devices_are_described(engine):
        raise InputError(
            f"RUNTIME: {engine} cannot give GPUs to a container here: no NVIDIA runtime and no CDI devices; install "
            f"the NVIDIA Container Toolkit (1.17.8 or newer) and run `nvidia-ctk "
            f"{'runtime configure --runtime=docker' if engine == 'docker' else 'cdi generate'}`, or RUNTIME=local"
        )
    return [part for gpu in gpus for part in ("--device", f"nvidia.com/gpu={gpu}")]


def _devices_are_described(engine: str) -> bool:
    """Whether there are files that describe NVIDIA's devices to an engine (CDI)."""
    if engine == "docker" and "nvidia.com/gpu" not in (_ask(["docker", "info", "--format", "{{json .}}"]) or ""):
        return False
    return any(file for folder in ("/etc/cdi", "/var/run/cdi") for file in Path(folder).glob("*nvidia*"))


def _fabric(gpus: list[str]) -> list[str]:
    return ["--device", "/dev/infiniband"] if gpus and Path("/dev/infiniband").is_dir() else []


def _revision() -> str:
    """The commit of the code, marked where the working tree differs from it."""
    commit = _ask(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    changed = _ask(["git", "-C", str(REPOSITORY), "status", "--porcelain"])
    return f"{commit.strip()}{'-dirty' if changed else ''}" if commit else "unknown"


def _build(engine: str) -> list[str]:
    """The command that builds the image of the variant."""
    variant = _variant(default="cuda")
    bases = {"cpu": ["--build-arg", f"BUILDER_IMAGE={_CPU_BASE}", "--build-arg", f"BASE_IMAGE={_CPU_BASE}"], "cuda": []}
    locked = (REPOSITORY / "requirements" / "requirements.in").read_text(encoding="utf-8")
    versions = [one for one in re.findall(r"^([\w-]+)==([\w.]+)", locked, re.MULTILINE) if one[0] in _LABELLED]
    labels = [part for name, version in versions for part in ("--label", f"sft-recipes.version.{name}={version}")]
    begins = {
        "podman": ["podman", "build", "--format", "docker"],  # its own format of an image has no health check
        "docker": ["env", "DOCKER_BUILDKIT=1", "docker", "build"],  # before 23 that was not the default
    }
    return [
        *begins[engine], "--file", str(REPOSITORY / "docker" / "Dockerfile"), "--tag", _image(variant),
        "--build-arg", f"TORCH={variant}", "--build-arg", f"REVISION={_revision()}", *labels, *bases[variant],
        *_more("BUILD_ARGS"), str(REPOSITORY),
    ]  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
