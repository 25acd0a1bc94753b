"""Format of a saved directory: checksums, required files, and the commit marker `complete.json`.

A directory is written under `.saving/`, hashed, gets its commit marker, and is then renamed: an atomic write. Nothing
in it is loaded before its checksums are verified.
"""

import fnmatch
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.atomic_write import sha256, sync, write_atomic
from sft_recipes.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

COMMIT_MARKER = "complete.json"
# Files of the training state. A model may need any other file of a checkpoint to be loaded.
TRAINING_STATE = re.compile(
    r"trainer_state\.json|optimizer\..*|scheduler\.pt|rng_state.*|pytorch_model_fsdp\.bin|global_step.*|latest"
)
# In messages about a disk or another node, where the error may be temporary and the files intact.
UNREADABLE = "cannot be read"
_OWN_CHECKSUM = "sha256_of_this_record"


class CorruptCheckpointError(Exception):
    """A directory does not hold what was saved."""


def writing_rank(name: str) -> int:
    """Return the rank that writes a file of a checkpoint; rank 0 if its name has no rank.

    Source: the names of transformers (`_save_rng_state`) and DeepSpeed (`_get_zero_ckpt_prefix`).
    """
    match = re.search(r"(?:^|/)(?:rng_state_|(?:bf16_)?zero_pp_rank_)(\d+)", name)
    return int(match[1]) if match else 0


def find_missing(plan: Plan, names: Iterable[str]) -> str | None:
    """Return the first kind of file that a checkpoint lacks: it would not load, or silently load other state."""
    ranks, expected = plan.world_size, {"*.safetensors": 1, "trainer_state.json": 1, "scheduler.pt": 1}
    expected |= {"rng_state*.pth": ranks, "*optim*": ranks if plan.strategy.deepspeed else 1}
    for pattern, count in expected.items():
        if len(fnmatch.filter(names, pattern)) < count:
            return f"{pattern} was not written on every rank" if count > 1 else f"{pattern} was not written"
    return None


def list_files(directory: Path) -> list[str]:
    """Return the relative paths of all files, except the commit marker and an NFS client's `.nfs…` files."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    relative = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in relative if name != COMMIT_MARKER and not Path(name).name.startswith(".nfs"))


def compute_checksums(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files, after an fsync of each."""
    files = {}
    for name in names:
        sync(directory / name)
        files[name] = {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
    return files


def write_commit_marker(directory: Path, record: dict[str, Any]) -> None:
    """Write the commit marker, after an fsync of all subdirectories; without it the directory is incomplete."""
    for path in (path for path in directory.rglob("*") if path.is_dir()):
        sync(path)
    write_atomic(directory / COMMIT_MARKER, _serialize(record))


def read_commit_marker(directory: Path, **expected: Any) -> dict[str, Any]:
    """Return the record in a directory's commit marker.

    Args:
        expected: required values of the record, such as `run_id` and `step`.

    Raises:
        CorruptCheckpointError: the marker is missing or corrupt, or the directory is another run's or step's.
    """
    try:
        text = (directory / COMMIT_MARKER).read_text(encoding="utf-8")
        record: dict[str, Any] = json.loads(text)
        del record[_OWN_CHECKSUM]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"no valid {COMMIT_MARKER}: incomplete, or written by another version") from error
    if text != _serialize(record):
        raise CorruptCheckpointError(f"checksum mismatch in {COMMIT_MARKER}")
    for key, value in expected.items():
        if record.get(key) != value:
            raise CorruptCheckpointError(f"{key} mismatch: found {record.get(key)}, expected {value}")
    return record


def list_own(folder: RunDir, kind: str, run_id: str) -> list[int]:
    """Return the steps of this run's complete `checkpoint-N` or `best-N`, ascending; only these may be removed."""
    return [step for step in folder.numbered(kind) if _read_run_id(folder.path / f"{kind}-{step}") == run_id]


def _read_run_id(directory: Path) -> Any:
    try:
        return read_commit_marker(directory).get("run_id")
    except CorruptCheckpointError:
        return None


def verify(directory: Path, **expected: Any) -> str | None:
    """Return the first difference of a directory from what was saved, or None; see `read_commit_marker`."""
    try:
        return verify_checksums(directory, read_commit_marker(directory, **expected))
    except CorruptCheckpointError as error:
        return str(error)


def verify_checksums(directory: Path, record: dict[str, Any], rank: int = 0, ranks: int = 1) -> str | None:
    """Return the first difference of this rank's part of the files from what was saved, or None.

    Bytes are counted and hashed, nothing is unpickled.
    """
    files = record["files"]
    try:
        if unknown := set(list_files(directory)) - set(files):
            return f"{min(unknown)} was not saved with it"
        for name in sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::ranks]:
            path, saved = directory / name, files[name]
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != saved["bytes"]:
                return f"size mismatch in {name}: found {path.stat().st_size} bytes, expected {saved['bytes']}"
            if sha256(path) != saved["sha256"]:
                return f"checksum mismatch in {name}"
    except OSError as error:
        return f"{Path(str(error.filename)).name} {UNREADABLE} ({error.strerror})"
    return None


def publish(partial: Path, target: Path, removing: Path) -> None:
    """Rename a complete directory to its final name; replace this run's own, quarantine anything else."""
    if target.exists() or target.is_symlink():
        if _read_run_id(target) == read_commit_marker(partial)["run_id"]:
            _move_to_removing(target, removing)
        else:
            quarantine(target)
    partial.replace(target)
    sync(target.parent)
    shutil.rmtree(removing, ignore_errors=True)


def quarantine(directory: Path) -> Path:
    """Rename a corrupt directory to the first free `NAME.corrupt-K`."""
    number = 1
    while (renamed := directory.with_name(f"{directory.name}.corrupt-{number}")).exists():
        number += 1
    return directory.replace(renamed)


def wait_until_visible(path: Path, seconds: float = timeouts.CHECKPOINT_VISIBLE) -> bool:
    """Wait until a directory that another node renamed is visible on this one; False after the timeout.

    NFS clients cache directory entries for 3 to 60 s by default (nfs(5), acdirmin and acdirmax). Transformers withdrew
    its own rename because of this (https://github.com/huggingface/transformers/issues/28119).
    """
    deadline = time.monotonic() + seconds
    # Listing the directory revalidates the NFS client's cache.
    while not path.parent.is_dir() or path not in path.parent.iterdir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def remove(directory: Path, removing: Path) -> None:
    """Remove a directory; it is renamed first, so that a half-removed one never looks complete."""
    try:
        _move_to_removing(directory, removing)
        shutil.rmtree(removing)
    except OSError as error:
        log.warning("%s could not be removed (%s)", directory, error.strerror)


def _move_to_removing(directory: Path, removing: Path) -> None:
    removing.mkdir(exist_ok=True)
    shutil.rmtree(removing / directory.name, ignore_errors=True)
    directory.replace(removing / directory.name)


def copy_model(source: Path, partial: Path, copy: Callable[[Path, Path], Any] = shutil.copy2) -> None:
    """Copy a directory's model, without commit marker and training state; `copy` copies one file."""
    for name in list_files(source):
        if not TRAINING_STATE.fullmatch(name):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            copy(source / name, partial / name)


def _serialize(record: dict[str, Any]) -> str:
    """Return a record as JSON, with its own checksum."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, _OWN_CHECKSUM: digest}, indent=1) + "\n"
