"""Decides where a verb of the front door runs, in a container or in a virtual environment here, and runs it there.

It is run by the machine's own python, which has nothing but its standard library:

    python3 -I sft_recipes/launching/container.py VENV VERB [word …]

What it reads: RUNTIME (`local`, `docker`, `podman`; where it is not said, a container is taken when GPUs are asked for
and an engine is there), IMAGE, VARIANT (`cuda`, `cpu`), MOUNTS, CONTAINER_ARGS, BUILD_ARGS, DRY_RUN.

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
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINES = ("docker", "podman")
# Verbs that compute where there are GPUs; the others need none.
_COMPUTING = ("train", "sanity", "verify-resume", "generate", "merge", "doctor", "smoke")
_OF_A_RUN = ("verify-resume", "diagnose", "report", "generate", "merge")
# Passed on by name, so that no value stands in a command line, which every user of the machine can read.
_PASSED = re.compile(
    r"(HF|HUGGING_FACE|WANDB|NCCL|GLOO|TORCH_NCCL)_\w+|OMP_NUM_THREADS|REPORT_TO|SANITY|GPU_HOUR_PRICE|NO_COLOR|COLUMNS|"
    r"TERM|TZ|(https?|all|no)_proxy|(HTTPS?|ALL|NO)_PROXY|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
)
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "WANDB_DIR")  # written to
_FILES = ("HF_TOKEN_PATH", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # read
# A stop waits for a save, which of a large model takes minutes; engines' own 10 seconds would cut it off.
_SECONDS_TO_STOP = 3600


class InputError(Exception):
    """Something that the user asked for is wrong or not there."""


@dataclass(frozen=True)
class Mount:
    """A folder or file of this machine that the container sees at the same place."""

    path: Path
    writable: bool = False

    def __str__(self) -> str:
        if ":" in str(self.path):
            raise InputError(f"{self.path}: engines cannot mount a path with a colon in it; move it, or RUNTIME=local")
        return f"{self.path}:{self.path}:{'rw' if self.writable else 'ro'}"


def main(venv: str, verb: str, words: list[str]) -> NoReturn:
    """Becomes the process that carries out the verb."""
    if verb == "image":
        _become(_build(_engine_asked_for()))
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
    _become(_command(runtime, verb, words))


def _here(python: str, verb: str, words: list[str]) -> NoReturn:
    os.execvp(python, [python, "-m", "sft_recipes", verb, *words])


def _become(command: list[str]) -> NoReturn:
    """The engine's client takes this process's place: signals and the exit code are its own then."""
    if os.environ.get("DRY_RUN"):
        print(shlex.join(command))
        sys.exit(0)
    os.execvp(command[0], command)


def _runtime(verb: str, words: list[str]) -> str:
    """Where it runs: `local`, or the engine."""
    asked = os.environ.get("RUNTIME", "")
    if asked in ENGINES:
        return _answering(asked)
    if asked in ("pyxis", "apptainer"):
        raise InputError(
            f"RUNTIME: {asked} starts an image in a Slurm job, which this does not; docker/README.md says how"
        )
    if asked not in ("", "local"):
        raise InputError(f"RUNTIME: {asked!r} is not known; say local, {' or '.join(ENGINES)}")
    wants_gpus = _value(words, "--devices") or _value(words, "--gpus") not in (None, "0")
    if asked == "local" or not (verb == "smoke" or (wants_gpus and _gpus())):
        return "local"
    return next((engine for engine in ENGINES if shutil.which(engine) and _answers(engine)), "local")


def _engine_asked_for() -> str:
    """The engine to build an image with."""
    asked = os.environ.get("RUNTIME") or next((one for one in ENGINES if shutil.which(one) and _answers(one)), "")
    if asked not in ENGINES:
        raise InputError("RUNTIME: neither docker nor podman answers here; install one, or say which: RUNTIME=podman")
    return _answering(asked)


def _answering(engine: str) -> str:
    if not shutil.which(engine):
        raise InputError(f"RUNTIME: there is no {engine} here; install it, or RUNTIME=local")
    if not _answers(engine):
        raise InputError(
            f"RUNTIME: {engine} is here, but its daemon does not answer; start it, be let use it, or RUNTIME=local"
        )
    return engine


def _answers(engine: str) -> bool:
    return _ask([engine, "info"]) is not None


def _ask(command: list[str]) -> str | None:
    """What a command says; None where it fails, or says nothing for a minute."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _variant() -> str:
    asked = os.environ.get("VARIANT", "")
    if asked not in ("", "cuda", "cpu"):
        raise InputError(f"VARIANT: {asked!r} is not known; say cuda or cpu")
    return asked or ("cuda" if _gpus() else "cpu")


def _image() -> str:
    return os.environ.get("IMAGE") or f"localhost/sft-recipes:{_variant()}"


def _command(engine: str, verb: str, words: list[str]) -> list[str]:
    """The whole command that carries out the verb in a container."""
    image = _image()
    found = _ask([engine, "image", "inspect", "--format", "{{.Id}}", image])
    if found is None:
        variant = "cpu" if image.endswith(":cpu") else "cuda"
        raise InputError(
            f"IMAGE: {engine} has no image {image}; build it with `make image VARIANT={variant}`, fetch it with "
            f"`{engine} pull`, name another with IMAGE=, or run without a container: RUNTIME=local"
        )
    gpus = _devices(words) if verb in _COMPUTING else []
    seen = f"GPUs {','.join(gpus)}" if gpus else "no GPU"
    print(f"in a container: {engine}, {image}, {seen} (RUNTIME=local runs without)", file=sys.stderr, flush=True)
    command = [
        engine, "run", "--rm", *_limits(engine, gpus), *_gpu_access(engine, gpus), *_fabric(),
        "--read-only", "--tmpfs", "/tmp:rw,exec,nosuid,nodev,mode=1777",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--stop-timeout", str(_SECONDS_TO_STOP),
        "--env", f"SFT_RECIPES_IMAGE={image} {found.strip()}",
    ]  # fmt: skip
    more = shlex.split(os.environ.get("CONTAINER_ARGS", ""))
    if verb == "smoke":  # of the image alone, as the user that it names
        words = [*_without(words, "--devices"), *(["--cpu"] if not gpus and "--cpu" not in words else [])]
        return [*command, "--network", "none", *more, image, "bash", "/opt/sft-recipes/docker/smoke.sh", *words]
    words = [word for word in _renumbered(words, gpus) if word != "--dry-run"]  # what is printed is this command
    mounts = _mounts(verb, words)
    interactive = ["--interactive", *(["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else [])]
    return [
        *command, *interactive, *_as_user(engine),
        *(["--network", "host"] if verb == "tensorboard" else []),  # it serves on this machine's own loopback
        *(part for mount in mounts for part in ("--volume", str(mount))),
        *(part for name in sorted(os.environ) if _PASSED.fullmatch(name) for part in ("--env", name)),
        "--env", f"RUNS_DIR={_runs()}", "--env", f"HF_HOME={_hub()}", "--env", f"PYTHONPATH={REPOSITORY}",
        "--env", f"SFT_RECIPES_REVISION={_revision()}", "--workdir", str(REPOSITORY),
        *more, image, "python", "-m", "sft_recipes", verb, *words,
    ]  # fmt: skip


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
    return [*limits, "--ulimit", "memlock=-1:-1", "--ulimit", "stack=67108864:67108864"]


def _as_user(engine: str) -> list[str]:
    """Whatever is written belongs to the user."""
    ids = ["--user", f"{os.geteuid()}:{os.getegid()}"]
    if engine == "docker":
        return ids
    return [*(["--userns", "keep-id"] if os.geteuid() != 0 else []), *ids, "--security-opt", "label=disable"]


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
    here, named, count = _gpus(), _value(words, "--devices"), _value(words, "--gpus")
    if named is not None:
        missing = [one for one in named.split(",") if one not in here]
        if missing:
            raise InputError(f"DEVICES: no GPU {', '.join(missing)} here; there are: {', '.join(here) or 'none'}")
        return named.split(",")
    if count is None or not count.isdigit():
        return here
    if int(count) > len(here):
        raise InputError(f"GPUS: {count} asked for, but this machine has {len(here) or 'none'}; say GPUS={len(here)}")
    return here[: int(count)]


def _renumbered(words: list[str], gpus: list[str]) -> list[str]:
    """Inside, the GPUs that were named are all there are, and numbered from 0."""
    if _value(words, "--devices") is None:
        return words
    rest = _without(words, "--devices")
    return rest if _value(rest, "--gpus") else [*rest[:1], "--gpus", str(len(gpus)), *rest[1:]]


def _gpu_access(engine: str, gpus: list[str]) -> list[str]:
    if not gpus:
        return []
    if engine == "docker" and '"nvidia"' in (_ask(["docker", "info", "--format", "{{json .Runtimes}}"]) or ""):
        return ["--gpus", f'"device={",".join(gpus)}"']
    if not any(_described_devices(engine)):
        raise InputError(
            f"RUNTIME: {engine} cannot give GPUs to a container here: no NVIDIA runtime and no CDI devices; install "
            f"the NVIDIA Container Toolkit (1.17.8 or newer) and run `nvidia-ctk cdi generate`, or RUNTIME=local"
        )
    return [part for gpu in gpus for part in ("--device", f"nvidia.com/gpu={gpu}")]


def _described_devices(engine: str) -> list[Path]:
    """The files that describe NVIDIA's devices to an engine (CDI)."""
    if engine == "docker" and "nvidia.com/gpu" not in (_ask(["docker", "info", "--format", "{{json .}}"]) or ""):
        return []
    return [file for folder in ("/etc/cdi", "/var/run/cdi") for file in Path(folder).glob("*nvidia*")]


def _fabric() -> list[str]:
    return ["--device", "/dev/infiniband"] if Path("/dev/infiniband").is_dir() else []


def _runs() -> Path:
    return _place(Path(os.environ.get("RUNS_DIR") or REPOSITORY / "runs"))


def _hub() -> Path:
    return _place(Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"))


def _place(path: Path) -> Path:
    """Where it is, without following a link."""
    return Path(os.path.normpath(path.absolute()))


def _mounts(verb: str, words: list[str]) -> list[Mount]:
    """The code, the user's data, the Hub's cache and the runs, each at its own place; outer ones first."""
    folders = [_runs(), _hub(), *(Path(os.environ[name]) for name in _FOLDERS if os.environ.get(name))]
    for folder in folders:
        _make(folder)
    named = [Path(part) for part in os.environ.get("MOUNTS", "").split(":") if part]
    for path in named:
        if not path.exists():
            raise InputError(f"MOUNTS: there is no {path} on this machine")
    read = [
        REPOSITORY,
        *named,
        *(Path(os.environ[name]) for name in _FILES if os.environ.get(name)),
        *_mentioned(words),
    ]
    written = [*folders, *_run_elsewhere(verb, words), *_pages(words)]
    mounts: dict[Path, Mount] = {}
    for paths, writable in ((read, False), (written, True)):
        for path in paths:
            for place in (_place(path), path.resolve()):  # a link is followed on both sides
                inside = [one for one in mounts.values() if one.path in (place, *place.parents)]
                if place.exists() and not any(one.writable >= writable for one in inside):
                    mounts[place] = Mount(place, writable)
    return sorted(mounts.values(), key=lambda mount: len(mount.path.parts))


def _make(folder: Path) -> None:
    """An engine would make it as root."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        owner = folder.stat().st_uid
        raise InputError(
            f"{folder} belongs to user {owner} and is not yours to write; say RUNS_DIR=<a folder of yours>"
        )


def _run_elsewhere(verb: str, words: list[str]) -> list[Path]:
    """A run that is named by its folder; what is made of it is written there."""
    named = words[:1] if verb in _OF_A_RUN else [_value(words, "--run") or ""]
    return [Path(one) for one in named if "/" in one]


def _pages(words: list[str]) -> list[Path]:
    """Files that a verb writes beside the code; each is made here, so that it alone can be written."""
    files = [Path(path) for path in (_value(words, option) for option in ("--html", "--plot")) if path]
    for file in files:
        if file.parent.is_dir() and os.access(file.parent, os.W_OK):
            file.touch()
    return files


def _mentioned(words: list[str]) -> list[Path]:
    """Files and folders that overrides or the recipe name, and where links in such a folder lead: the Hub's cache has
    links for files."""
    texts = [word for word in words if re.match(r"[\w.-]+=", word)]
    recipe = REPOSITORY / "recipes" / f"{words[0]}.yaml" if words and re.fullmatch(r"[\w.-]+", words[0]) else None
    if recipe is not None and recipe.is_file():
        texts += recipe.read_text(encoding="utf-8").splitlines()
    found = [path for text in texts for path in _paths(text)]
    links = [link for path in found if path.is_dir() for link in path.iterdir() if link.is_symlink()]
    return [*found, *(link.resolve() for link in links)]


def _paths(text: str) -> list[Path]:
    """What in a `key=value`, a list or a line of YAML is a file or folder that is there."""
    whole = re.sub(r"^[\w.-]+\s*[=:]\s*", "", text.strip())
    parts = [whole, *re.split(r"[\[\]{},=]|:\s", whole)]
    named = dict.fromkeys(part.strip().strip("'\"") for part in parts)
    return [
        path for path in map(Path, filter(None, named)) if path.resolve() != path.resolve().parent and _exists(path)
    ]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or not one
        return False


def _without(words: list[str], option: str) -> list[str]:
    at = words.index(option) if option in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def _value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words[:-1] else None


def _revision() -> str:
    """The commit of the code, marked where the working tree differs from it."""
    commit = _ask(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    changed = _ask(["git", "-C", str(REPOSITORY), "status", "--porcelain"])
    return f"{commit.strip()}{'-dirty' if changed else ''}" if commit else "unknown"


def _build(engine: str) -> list[str]:
    """The command that builds the image of the variant."""
    variant = _variant()
    bases = {"cpu": ["--build-arg", f"BUILDER_IMAGE={_CPU_BASE}", "--build-arg", f"BASE_IMAGE={_CPU_BASE}"], "cuda": []}
    locked = (REPOSITORY / "requirements" / "requirements.in").read_text(encoding="utf-8")
    versions = [one for one in re.findall(r"^([\w-]+)==([\w.]+)", locked, re.MULTILINE) if one[0] in _LABELLED]
    labels = [part for name, version in versions for part in ("--label", f"sft-recipes.version.{name}={version}")]
    begins = {
        "podman": ["podman", "build", "--format", "docker"],  # its own format of an image has no health check
        "docker": ["env", "DOCKER_BUILDKIT=1", "docker", "build"],  # before 23 that was not the default
    }
    return [
        *begins[engine], "--file", str(REPOSITORY / "docker" / "Dockerfile"), "--tag", _image(),
        "--build-arg", f"TORCH={variant}", "--build-arg", f"REVISION={_revision()}", *labels, *bases[variant],
        *shlex.split(os.environ.get("BUILD_ARGS", "")), str(REPOSITORY),
    ]  # fmt: skip


_LABELLED = ("torch", "transformers", "trl", "accelerate", "deepspeed")
_CPU_BASE = "docker.io/library/ubuntu:24.04"  # the distribution of NVIDIA's own images


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
