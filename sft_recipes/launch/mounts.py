"""Determine what a container mounts: the code, runs, caches, and every file that a command names.

Everything is mounted at its own path, so that a path means the same on both sides. This module needs only Python's
standard library, because the host may have nothing else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.runtime.paths import REPOSITORY, hf_home

# Commands whose first argument is a run.
RUN_COMMANDS = ("verify-resume", "diagnose", "report", "status", "generate", "merge")
# Variables that name folders to mount read-write, and files and folders to mount read-only.
WRITTEN = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "WANDB_DIR",
    "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "CUDA_CACHE_PATH",
    "CUDA_MPS_PIPE_DIRECTORY", "PYTORCH_KERNEL_CACHE_PATH",
)  # fmt: skip
READ = (
    "HF_TOKEN_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NCCL_TOPO_FILE",
    "NCCL_GRAPH_FILE", "TRITON_OVERRIDE_DIR",
)  # fmt: skip
# Files of a run that name its data and model.
_RECORDS = ("plan.json", "prepared.json", "final/adapter_config.json")
# A mount over one of these would hide the image's own files, or share the host's /tmp.
_IMAGE_FOLDERS = {Path(path) for path in ("/", "/bin", "/dev", "/etc", "/lib", "/opt", "/proc", "/sys", "/tmp", "/usr")}
_MAX_LINKS = 40  # the kernel's limit


class InputError(Exception):
    """An invalid value or a missing file in the user's request."""


@dataclass(frozen=True)
class Mount:
    """A host folder or file that the container sees at the same path."""

    path: Path
    writable: bool = False

    def __str__(self) -> str:
        if ":" in str(self.path):
            raise InputError(f"{self.path}: a path with a colon cannot be mounted. Move it, or set RUNTIME=local")
        return f"{self.path}:{self.path}:{'rw' if self.writable else 'ro'}"


def runs_folder() -> Path:
    """Return the folder of all runs."""
    return normalize(os.environ.get("RUNS_DIR") or str(REPOSITORY / "runs"))


def normalize(path: str | Path) -> Path:
    """Return the absolute path with `~` expanded; links are not followed."""
    return Path(os.path.normpath(Path(os.path.expanduser(path)).absolute()))  # noqa: PTH111  as the loaders do


def required(command: str, arguments: list[str], dry_run: bool) -> list[Mount]:
    """Return the mounts of a command, outer folders first.

    Args:
        dry_run: create no folder or file.

    Raises:
        InputError: a folder is missing, not writable, or would hide files of the image.
    """
    paths = [(REPOSITORY, False), *((path, False) for path in _named_paths(command, arguments))]
    for name, path, writable in _variable_paths():
        if writable and not dry_run:
            _create_folder(name, path)
        paths.append((path, writable))
    paths += [(path, True) for path in (*_run_folders(command, arguments), *_output_files(arguments, dry_run))]
    mounts: dict[Path, Mount] = {}
    for path, writable in sorted(paths, key=lambda entry: entry[1]):
        _add(mounts, path, writable)
    return sorted(mounts.values(), key=lambda mount: len(mount.path.parts))


def _add(mounts: dict[Path, Mount], path: Path, writable: bool) -> None:
    """Mount a path; if it is inside another mount already, mount the target of a link in it instead."""
    target: Path | None = normalize(path)
    for _ in range(_MAX_LINKS):
        if target is None:
            return
        outer = [mount for mounted, mount in mounts.items() if mounted == target or mounted in target.parents]
        if not any(mount.writable >= writable for mount in outer):
            _reject_image_folder(target)
            mounts[target] = Mount(target, writable)  # the container runtime follows the link
            return
        target = _follow_link(target)


def _reject_image_folder(path: Path) -> None:
    """Reject system folders before any other check, so that every user gets the same error.

    Raises:
        InputError: the image has this folder itself.
    """
    if path in _IMAGE_FOLDERS:
        raise InputError(f"{path}: the image has its own. Use a folder inside it, or set RUNTIME=local")


def _follow_link(path: Path) -> Path | None:
    """Follow the first link in the path once; None if it has no link."""
    for part in (*reversed(path.parents), path):
        if part.is_symlink():
            return Path(os.path.normpath(part.parent / part.readlink() / path.relative_to(part)))
    return None


def _variable_paths() -> Iterator[tuple[str, Path, bool]]:
    """Yield variable name, path, and whether it is written to."""
    yield "RUNS_DIR", runs_folder(), True
    yield "HF_HOME", hf_home(), True
    yield from ((name, normalize(os.environ[name]), True) for name in WRITTEN if os.environ.get(name))
    yield from (
        (name, normalize(os.environ[name]), False)
        for name in READ
        if os.environ.get(name) and exists(Path(os.environ[name]))
    )
    for part in filter(None, os.environ.get("MOUNTS", "").split(":")):
        path = normalize(part)
        if not path.exists() or path in _IMAGE_FOLDERS:
            problem = "the image has its own" if path.exists() else "folder not found"
            raise InputError(f"MOUNTS: {path}: {problem}. Set MOUNTS to folders of data")
        yield from (("MOUNTS", link, False) for link in (path, *_links_in(path)))


def _create_folder(name: str, folder: Path) -> None:
    """Create a folder that is written to, as the user: the container runtime would create it as root.

    Raises:
        InputError: it cannot be created, or it is the folder of runs and not writable. A read-only cache is accepted.
    """
    _reject_image_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}: cannot create {folder} ({error.strerror}). Set {name} to another folder") from error
    if name == "RUNS_DIR" and not os.access(folder, os.W_OK | os.X_OK):
        owner = folder.stat().st_uid
        raise InputError(f"{name}: {folder} is not writable and belongs to user {owner}. Set {name} to your own folder")


def _run_folders(command: str, arguments: list[str]) -> list[Path]:
    """Return the folder of the run that the command reads and writes, which may be a link or anywhere on the disk."""
    name = arguments[0] if command in RUN_COMMANDS and arguments else option_value(arguments, "--run")
    if not name:
        return []
    folder = Path(name) if "/" in name else runs_folder() / name
    return [folder] if exists(folder) else []


def _output_files(arguments: list[str], dry_run: bool) -> list[Path]:
    """Return the files that the command writes outside of runs; each is created here, so that only it is writable."""
    options = (option_value(arguments, option) for option in ("--html", "--plot"))
    files = [normalize(path) for path in options if path]
    writable = [file for file in files if file.parent.is_dir() and os.access(file.parent, os.W_OK)]
    for file in writable:
        if not dry_run:
            file.touch()
    return writable


def _named_paths(command: str, arguments: list[str]) -> list[Path]:
    """Return the files and folders that overrides, the recipe or the run's records name, and the links in them."""
    texts = [argument for argument in arguments if re.match(r"[\w.-]+=", argument)]
    if arguments and re.fullmatch(r"[\w.-]+", arguments[0]):
        recipe = REPOSITORY / "recipes" / f"{arguments[0]}.yaml"
        texts += recipe.read_text(encoding="utf-8").splitlines() if recipe.is_file() else []
    for run in _run_folders(command, arguments):
        texts += [text for name in _RECORDS for text in _strings(_read_json(run / name))]
    paths = [path for text in texts for path in _existing_paths(text)]
    return [*paths, *(link for path in paths for link in _links_in(path))]


def _existing_paths(text: str) -> list[Path]:
    """Return the existing files and folders in a `key=value`, a list or a line of YAML."""
    value = re.sub(r"^(-\s+)?([\w.-]+\s*[=:]\s*)?", "", text.strip())
    uncommented = re.sub(r"\s+#.*$", "", value)
    candidates = (value, uncommented, *re.split(r"[\[\]{},]|:\s", uncommented))
    parts = dict.fromkeys(part.strip().strip("'\"") for part in candidates)
    paths = (normalize(part) for part in parts if part and exists(Path(os.path.expanduser(part))))  # noqa: PTH111
    return [path for path in paths if path not in _IMAGE_FOLDERS]


def _links_in(folder: Path) -> Iterator[Path]:
    """Yield the links in a folder, at any depth and through linked folders; the Hub's cache has links for files."""
    seen, pending = set(), [folder]
    while pending:
        for parent, folders, files in os.walk(pending.pop()):
            for name in (*folders, *files):
                entry = Path(parent, name)
                if entry.is_symlink() and exists(entry) and (target := entry.resolve()) not in seen:
                    seen.add(target)
                    yield entry
                    pending.append(target)


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, Mapping)):
        for item in content.values() if isinstance(content, Mapping) else content:
            yield from _strings(item)


def _read_json(file: Path) -> Any:
    """Return the content of a run's record; None if it is corrupt, which the command itself reports."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def exists(path: Path) -> bool:
    """Whether the path exists; False for a text too long for a file name, or a link to itself."""
    try:
        return path.resolve(strict=True).exists()
    except (OSError, ValueError, RuntimeError):
        return False


def option_value(arguments: list[str], option: str) -> str | None:
    """Return the value of an option; None if the option is absent."""
    return arguments[arguments.index(option) + 1] if option in arguments[:-1] else None
