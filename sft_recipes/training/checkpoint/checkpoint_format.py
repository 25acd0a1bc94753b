"""Format of a saved directory: required files, checksums, and the commit marker `complete.json`.

A directory is written under `.saving/`, hashed, gets its commit marker, and is then renamed: an atomic write. Nothing
in it is loaded before its checksums are verified.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime import timeouts
from sft_recipes.runtime.atomic_write import sha256, sync, write_atomic
from sft_recipes.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

COMMIT_MARKER = "complete.json"
# Files of the training state. A model may need any other file of a checkpoint to be loaded.
TRAINING_STATE = (
    "trainer_state.json",
    "optimizer.*",
    "scheduler.pt",
    "rng_state*",
    "pytorch_model_fsdp.bin",
    "global_step*",
    "latest",
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


def required_files(plan: Plan, step: int) -> set[str]:
    """Return the files without which a checkpoint does not load, or silently loads other state."""
    ranks = range(plan.world_size)
    rng = {f"rng_state_{rank}.pth" for rank in ranks} if plan.world_size > 1 else {"rng_state.pth"}
    always = {"trainer_state.json", "scheduler.pt", *rng}
    if not plan.strategy.deepspeed:
        return {*always, "optimizer.bin" if plan.strategy.fsdp else "optimizer.pt"}
    prefix = f"global_step{step}/{'bf16_' if plan.precision == 'bf16' else ''}zero_pp_rank"
    partitions = {f"{prefix}_{rank}_mp_rank_00_optim_states.pt" for rank in ranks}
    rank_prefixes = [f"zero_pp_rank_{rank}_" for rank in ranks] if plan.shards_parameters else [""]
    states = {f"global_step{step}/{prefix}mp_rank_00_model_states.pt" for prefix in rank_prefixes}
    return {*always, *partitions, *states, "latest"}


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


def read_commit_marker(directory: Path) -> dict[str, Any]:
    """Return the record in a directory's commit marker.

    Raises:
        CorruptCheckpointError: the marker is missing or corrupt.
    """
    try:
        text = (directory / COMMIT_MARKER).read_text(encoding="utf-8")
        record = json.loads(text)
        del record[_OWN_CHECKSUM]
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"no {COMMIT_MARKER}: incomplete, or written by another version") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptCheckpointError(f"{COMMIT_MARKER} is corrupt, or written by another version") from error
    if text != _serialize(record):
        raise CorruptCheckpointError(f"checksum mismatch in {COMMIT_MARKER}")
    return dict(record)


def read_run_id(directory: Path) -> str | None:
    """Return the id of the run that wrote a directory; None without a valid commit marker."""
    try:
        return read_commit_marker(directory).get("run_id")
    except CorruptCheckpointError:
        return None


def read_own_record(folder: RunDir, step: int, run_id: str) -> dict[str, Any]:
    """Return the record of a checkpoint of this run.

    Raises:
        CorruptCheckpointError: it is of another run or step, or has no valid commit marker.
    """
    record = read_commit_marker(folder.checkpoint(step))
    if record.get("run_id") != run_id:
        raise CorruptCheckpointError(f"of another run: found id {record.get('run_id')}, expected {run_id}")
    if record.get("step") != step:
        raise CorruptCheckpointError(f"of another step: found {record.get('step')}, expected {step}")
    return record


def list_own_checkpoints(folder: RunDir, run_id: str) -> list[int]:
    """Return the steps of this run's complete checkpoints, ascending; only these may be removed."""
    steps = []
    for step in folder.numbered("checkpoint"):
        with contextlib.suppress(CorruptCheckpointError):
            read_own_record(folder, step, run_id)
            steps.append(step)
    return steps


def verify_checksums(directory: Path, record: dict[str, Any], names: Collection[str] | None = None) -> str | None:
    """Return the first difference from what was saved, or None. Bytes are counted and hashed, nothing is unpickled.

    Args:
        names: the files to verify, all by default.
    """
    files = record["files"]
    try:
        unknown = sorted(set(list_files(directory)) - set(files))
        if unknown:
            return f"{unknown[0]} was not saved with it"
        chosen = (name for name in files if names is None or name in names)
        return next((problem for name in chosen if (problem := _verify_file(directory, name, files))), None)
    except OSError as error:
        return f"{Path(str(error.filename)).name} {UNREADABLE} ({error.strerror})"


def _verify_file(directory: Path, name: str, files: dict[str, Any]) -> str | None:
    path, saved = directory / name, files[name]
    if path.is_symlink() or not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != saved["bytes"]:
        return f"size mismatch in {name}: found {path.stat().st_size} bytes, expected {saved['bytes']}"
    return None if sha256(path) == saved["sha256"] else f"checksum mismatch in {name}"


def assign_files(record: dict[str, Any], rank: int, ranks: int) -> list[str]:
    """Return the files that a rank verifies: each file on one rank, bytes balanced over ranks."""
    files: dict[str, dict[str, int]] = record["files"]
    load = [0] * ranks
    assigned: list[list[str]] = [[] for _ in range(ranks)]
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = load.index(min(load))
        assigned[least].append(name)
        load[least] += files[name]["bytes"]
    return assigned[rank]


def publish(partial: Path, target: Path, removing: Path) -> None:
    """Rename a complete directory to its final name; replace this run's own, quarantine anything else."""
    replaced = None
    if target.exists() or target.is_symlink():
        previous = read_run_id(target)
        if previous is not None and previous == read_run_id(partial):
            replaced = _move_to_removing(target, removing)
        else:
            quarantine(target)
    try:
        partial.replace(target)
    except OSError:
        if replaced is not None:
            replaced.replace(target)
        raise
    sync(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def quarantine(directory: Path) -> Path:
    """Rename a corrupt directory to the first free `NAME.corrupt-K`."""
    number = 1
    while (renamed := directory.with_name(f"{directory.name}.corrupt-{number}")).exists():
        number += 1
    directory.replace(renamed)
    return renamed


def wait_until_visible(path: Path, seconds: float = timeouts.CHECKPOINT_VISIBLE) -> bool:
    """Wait until a directory that another node renamed is visible on this one; False after the timeout.

    NFS clients cache directory entries for 3 to 60 s by default (nfs(5), acdirmin and acdirmax). Transformers withdrew
    its own rename because of this (https://github.com/huggingface/transformers/issues/28119).
    """
    deadline = time.monotonic() + seconds
    while path not in path.parent.iterdir():  # listing the directory revalidates the NFS client's cache
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def remove(directory: Path, removing: Path) -> None:
    """Remove a directory; it is renamed first, so that a half-removed one never looks complete."""
    try:
        shutil.rmtree(_move_to_removing(directory, removing))
    except OSError as error:
        log.warning("%s could not be removed (%s)", directory, error.strerror)


def _move_to_removing(directory: Path, removing: Path) -> Path:
    removing.mkdir(exist_ok=True)
    moved = removing / directory.name
    if moved.exists():
        shutil.rmtree(moved)
    directory.replace(moved)
    return moved


def copy_model(source: Path, partial: Path, copy: Callable[[Path, Path], Any] = shutil.copy2) -> None:
    """Copy a directory's model, without commit marker and training state; `copy` copies one file."""
    for name in list_files(source):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in TRAINING_STATE):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            copy(source / name, partial / name)


def _serialize(record: dict[str, Any]) -> str:
    """Return a record as JSON, with its own checksum."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, _OWN_CHECKSUM: digest}, indent=1) + "\n"
