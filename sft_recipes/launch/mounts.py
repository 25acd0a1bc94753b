"""What a container sees of this machine: the code, runs, caches, and every file that a verb was told of.

Everything is mounted at its own place, so that a path means the same on both sides. Python's standard library is enough
for this module: the machine may have no more.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Verbs whose first word is a run.
OF_A_RUN = ("verify-resume", "diagnose", "report", "status", "generate", "merge")
# Variables that name folders which are written to where they can be, and files and folders that are read.
WRITTEN = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "WANDB_DIR",
    "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "CUDA_CACHE_PATH",
    "CUDA_MPS_PIPE_DIRECTORY", "PYTORCH_KERNEL_CACHE_PATH",
)  # fmt: skip
READ = (
    "HF_TOKEN_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NCCL_TOPO_FILE",
    "NCCL_GRAPH_FILE", "TRITON_OVERRIDE_DIR",
)  # fmt: skip
# What a run keeps of the data and the model that it was made of.
_RECORDS = ("plan.json", "prepared.json", "final/adapter_config.json")
# Over these the image would not be itself, or /tmp no place of its own.
_OF_THE_IMAGE = {
    Path(place) for place in ("/", "/bin", "/dev", "/etc", "/lib", "/opt", "/proc", "/sys", "/tmp", "/usr")
}
_LINKS_AT_MOST = 40  # as the kernel


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


def runs() -> Path:
    """The folder of all runs."""
    return place(os.environ.get("RUNS_DIR") or str(REPOSITORY / "runs"))


def hub() -> Path:
    """The Hub's folder, where `huggingface_hub` looks for it."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return place(os.environ.get("HF_HOME") or f"{cache}/huggingface")


def place(path: str | Path) -> Path:
    """Where it is, without following a link."""
    return Path(os.path.normpath(Path(os.path.expanduser(path)).absolute()))  # noqa: PTH111  as the loaders do


def needed(verb: str, words: list[str], dry: bool) -> list[Mount]:
    """What the verb needs, outer places first.

    Args:
        dry: nothing is made.

    Raises:
        InputError: a folder is not there or cannot be written, or would hide the image.
    """
    wanted = [(REPOSITORY, False), *((path, False) for path in _mentioned(verb, words))]
    for name, path, writable in _of_variables():
        if writable and not dry:
            _make(name, path)
        wanted.append((path, writable))
    wanted += [(path, True) for path in (*_run_elsewhere(verb, words), *_pages(words, dry))]
    mounts: dict[Path, Mount] = {}
    for path, writable in sorted(wanted, key=lambda one: one[1]):
        _add(mounts, path, writable)
    return sorted(mounts.values(), key=lambda mount: len(mount.path.parts))


def _add(mounts: dict[Path, Mount], path: Path, writable: bool) -> None:
    """Mounts a path; where it lies in something that is mounted, what a link there leads to."""
    here: Path | None = place(path)
    for _ in range(_LINKS_AT_MOST):
        if here is None:
            return
        inside = [mount for at, mount in mounts.items() if at == here or at in here.parents]
        if not any(mount.writable >= writable for mount in inside):
            _must_not_hide_the_image(here)
            mounts[here] = Mount(here, writable)  # the engine itself follows it
            return
        here = _next_hop(here)


def _must_not_hide_the_image(path: Path) -> None:
    """Rejects system folders before anything else about them is checked, so that every user gets the same line.

    Raises:
        InputError: the image has this folder itself.
    """
    if path in _OF_THE_IMAGE:
        raise InputError(f"{path}: a container has its own; name a folder in it, or RUNTIME=local")


def _next_hop(path: Path) -> Path | None:
    """The path with the first link in it followed once; None where there is none."""
    for part in (*reversed(path.parents), path):
        if part.is_symlink():
            return Path(os.path.normpath(part.parent / part.readlink() / path.relative_to(part)))
    return None


def _of_variables() -> Iterator[tuple[str, Path, bool]]:
    """The name of a variable, the place that it names, and whether that is written to."""
    yield "RUNS_DIR", runs(), True
    yield "HF_HOME", hub(), True
    yield from ((name, place(os.environ[name]), True) for name in WRITTEN if os.environ.get(name))
    yield from (
        (name, place(os.environ[name]), False)
        for name in READ
        if os.environ.get(name) and exists(Path(os.environ[name]))
    )
    for part in filter(None, os.environ.get("MOUNTS", "").split(":")):
        path = place(part)
        if not path.exists() or path in _OF_THE_IMAGE:
            wrong = "a container has its own" if path.exists() else "there is no such folder on this machine"
            raise InputError(f"MOUNTS: {path}: {wrong}; name a folder of data")
        yield from (("MOUNTS", one, False) for one in (path, *_links_in(path)))


def _make(name: str, folder: Path) -> None:
    """Makes a folder that is written to, as the user: an engine would make it as root.

    Raises:
        InputError: it cannot be made, or is that of runs and cannot be written. A cache that can be read alone will do.
    """
    _must_not_hide_the_image(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}: {folder} cannot be made ({error.strerror}); name another folder") from error
    if name == "RUNS_DIR" and not os.access(folder, os.W_OK | os.X_OK):
        owner = folder.stat().st_uid
        raise InputError(f"{name}: {folder} belongs to user {owner} and is not yours to write; name one of yours")


def _run_elsewhere(verb: str, words: list[str]) -> list[Path]:
    """The run that a verb is about, whose folder may be a link or lie anywhere; what is made of it is written there."""
    name = words[0] if verb in OF_A_RUN and words else value(words, "--run")
    if not name:
        return []
    folders = [Path(name) if "/" in name else runs() / name]
    return [folder for folder in folders if exists(folder)]


def _pages(words: list[str], dry: bool) -> list[Path]:
    """Files that a verb writes beside the code; each is made here, so that it alone can be written."""
    files = [place(path) for path in (value(words, option) for option in ("--html", "--plot")) if path]
    there = [file for file in files if file.parent.is_dir() and os.access(file.parent, os.W_OK)]
    for file in there:
        if not dry:
            file.touch()
    return there


def _mentioned(verb: str, words: list[str]) -> list[Path]:
    """Files and folders that overrides, the recipe or the run's own records name, and what links in them lead to."""
    texts = [word for word in words if re.match(r"[\w.-]+=", word)]
    if words and re.fullmatch(r"[\w.-]+", words[0]):
        recipe = REPOSITORY / "recipes" / f"{words[0]}.yaml"
        texts += recipe.read_text(encoding="utf-8").splitlines() if recipe.is_file() else []
    for run in _run_elsewhere(verb, words):
        texts += [text for name in _RECORDS for text in _strings(_read(run / name))]
    found = [path for text in texts for path in _paths(text)]
    return [*found, *(link for path in found for link in _links_in(path))]


def _paths(text: str) -> list[Path]:
    """What in a `key=value`, a list or a line of YAML is a file or folder that is there."""
    whole = re.sub(r"^(-\s+)?([\w.-]+\s*[=:]\s*)?", "", text.strip())
    bare = re.sub(r"\s+#.*$", "", whole)
    parts = dict.fromkeys(part.strip().strip("'\"") for part in (whole, bare, *re.split(r"[\[\]{},]|:\s", bare)))
    there = (place(part) for part in parts if part and exists(Path(os.path.expanduser(part))))  # noqa: PTH111
    return [path for path in there if path not in _OF_THE_IMAGE]


def _links_in(folder: Path) -> Iterator[Path]:
    """Where links in a folder, at any depth, lead; the Hub's cache has links for files."""
    seen, left = set(), [folder]
    while left:
        for at, folders, files in os.walk(left.pop()):
            for name in (*folders, *files):
                entry = Path(at, name)
                if entry.is_symlink() and exists(entry) and (target := entry.resolve()) not in seen:
                    seen.add(target)
                    yield entry
                    left.append(target)


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, Mapping)):
        for one in content.values() if isinstance(content, Mapping) else content:
            yield from _strings(one)


def _read(file: Path) -> Any:
    """What a run's record holds; nothing where it is damaged, which the verb itself tells."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def exists(path: Path) -> bool:
    """Whether it is there and can be looked at: a text may be too long for a name, a link lead to itself."""
    try:
        return path.resolve(strict=True).exists()
    except (OSError, ValueError, RuntimeError):
        return False


def value(words: list[str], option: str) -> str | None:
    """What stands behind an option."""
    return words[words.index(option) + 1] if option in words[:-1] else None
