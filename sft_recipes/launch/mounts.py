"""Determine what a container mounts: code, runs, caches, MOUNTS, and the data and model that overrides name.

Everything is mounted at its own path, so that a path means the same on both sides. This module needs only Python's
standard library, because the host may have nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY, absolute, hf_home, hub_cache

# Passed by name, so that no value appears in a command line, which every user of the machine can read.
_PASSED = re.compile(
    r"(HF|HUGGING_FACE|NCCL|GLOO|TORCH_NCCL|WANDB|CLEARML|CODECARBON|COMET|DAGSHUB|MLFLOW|NEPTUNE|SWANLAB|TRACKIO)_\w+|"
    # Not those that describe the host's installation.
    r"(?!CUDA_V|PYTORCH_NVCC)(CUDA|TRITON|DS|PYTORCH)_(?!(\w+_)?(HOME|ROOT|PATH|DIRS?|DIRECTORY)$|TOOLKIT_ROOT)\w+|TRITON_CACHE_DIR|CUDA_CACHE_PATH|"
    r"TORCH_DISTRIBUTED_DEBUG|FLASH_ATTENTION_DETERMINISTIC|"
    r"OMP_NUM_THREADS|REPORT_TO|SANITY|GPU_HOUR_PRICE|ALLOW_SOCKETS|NO_COLOR|TERM|(https?|all|no)_proxy|"
    r"(HTTPS?|ALL|NO)_PROXY|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
)
# A mount over one of these would hide the image's own files, or share the host's /tmp.
_IMAGE_FOLDERS = {Path(path) for path in ("/", "/bin", "/dev", "/etc", "/lib", "/opt", "/proc", "/sys", "/tmp", "/usr")}


def passed_variables() -> list[str]:
    """Return the names of the user's variables that a container gets."""
    return sorted(name for name in os.environ if _PASSED.fullmatch(name))


def runs_folder() -> Path:
    """Return the folder of all runs."""
    return absolute(os.environ.get("RUNS_DIR") or str(REPOSITORY / "runs"))


def volumes(arguments: list[str], create: bool) -> list[str]:
    """Return the mounts of a command as `PATH:PATH:ro` or `PATH:PATH:rw`, outer folders first.

    Args:
        arguments: of the command.
        create: whether to create RUNS_DIR and HF_HOME, as the user: the container runtime would create them as root.

    Raises:
        SetupError: a folder is missing, cannot be created, or would hide files of the image.
    """
    mounted = [absolute(part) for part in filter(None, os.environ.get("MOUNTS", "").split(":"))]
    if missing := [path for path in mounted if not _exists(path)]:
        raise SetupError(f"MOUNTS: file or folder not found: {missing[0]}. Create it, or leave it out")
    writable = [runs_folder(), hf_home(), hub_cache()]
    try:
        for folder in writable if create else ():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"RUNS_DIR, HF_HOME: cannot create {folder} ({error.strerror}). Set another one") from error
    if arguments and _exists(run := runs_folder() / arguments[0]):
        writable.append(run)  # a run elsewhere, or a link
    read_only = [REPOSITORY, *_named_paths(arguments), *mounted]
    modes = {path: "ro" for named in read_only for path in (named, named.resolve())}
    modes |= {path: "rw" for named in writable for path in (named, named.resolve())}
    for path in modes:
        if path in _IMAGE_FOLDERS or ":" in str(path):
            raise SetupError(f"{path}: cannot be mounted: the image has its own, or it has a colon. Use another folder")
    outer = {path: next((modes[parent] for parent in path.parents if parent in modes), None) for path in modes}
    return [f"{path}:{path}:{mode}" for path, mode in sorted(modes.items()) if outer[path] not in (mode, "rw")]


def _named_paths(arguments: list[str]) -> Iterator[Path]:
    """Yield the existing paths that overrides have as a value or in a list."""
    for value in filter(None, (argument.partition("=")[2] for argument in arguments)):
        for part in (value, *value.strip("[]").split(",")):
            path = absolute(part.strip(" '\""), REPOSITORY)
            if _exists(path) and path not in _IMAGE_FOLDERS:
                yield path


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path's own raises for a text that is too long for a name
