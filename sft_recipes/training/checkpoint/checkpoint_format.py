"""Knows what makes a saved folder whole: the files that it must hold, their checksums, and the record that is its seal.

A folder is written under `.saving/`, hashed, sealed and only then given its name; nothing in it is read before its
checksums have been found right.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
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

COMPLETE = "complete.json"
# What of a checkpoint is the training's, not the model's: whatever else lies there, a model may need to be loaded.
TRAINING_STATE = (
    "trainer_state.json",
    "optimizer.*",
    "scheduler.pt",
    "rng_state*",
    "pytorch_model_fsdp.bin",
    "global_step*",
    "latest",
)
# A rename on one node is seen by the others when their NFS client looks again: 3 to 60 s with its defaults (nfs(5),
# acdirmin and acdirmax). Transformers withdrew its own rename over it
# (https://github.com/huggingface/transformers/issues/28119).
# What a disk or another node is to blame for, perhaps for a moment: the files may be as they were saved.
CANNOT_BE_READ = "cannot be read"
_SELF = "sha256_of_this_record"


class CorruptCheckpointError(Exception):
    """A folder is not what was saved, and why."""


def writer(name: str) -> int:
    """The rank that writes a file of a checkpoint; rank 0 where its name says none.

    Source: the names of transformers (`_save_rng_state`) and DeepSpeed (`_get_zero_ckpt_prefix`).
    """
    named = re.search(r"(?:^|/)(?:rng_state_|(?:bf16_)?zero_pp_rank_)(\d+)", name)
    return int(named[1]) if named else 0


def needed(plan: Plan, step: int) -> set[str]:
    """Files without which a checkpoint would load in silence, or not at all, and end in other weights."""
    ranks = range(plan.world_size)
    rng = {f"rng_state_{rank}.pth" for rank in ranks} if plan.world_size > 1 else {"rng_state.pth"}
    always = {"trainer_state.json", "scheduler.pt", *rng}
    if not plan.strategy.deepspeed:
        return {*always, "optimizer.bin" if plan.strategy.fsdp else "optimizer.pt"}
    prefix = f"global_step{step}/{'bf16_' if plan.precision == 'bf16' else ''}zero_pp_rank"
    partitions = {f"{prefix}_{rank}_mp_rank_00_optim_states.pt" for rank in ranks}
    of_ranks = [f"zero_pp_rank_{rank}_" for rank in ranks] if plan.shards_parameters else [""]
    states = {f"global_step{step}/{of_rank}mp_rank_00_model_states.pt" for of_rank in of_ranks}
    return {*always, *partitions, *states, "latest"}


def names(folder: Path) -> list[str]:
    """Every file of a folder by its path in it, but for the record and what an NFS client leaves (`.nfs…`)."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    relative = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in relative if name != COMPLETE and not Path(name).name.startswith(".nfs"))


def checksums(folder: Path, of: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, each written to the disk first."""
    found = {}
    for name in of:
        sync(folder / name)
        found[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    return found


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record of a folder whose files are on the disk; without it the folder is not whole."""
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    write_atomic(folder / COMPLETE, _text(record))


def read(folder: Path) -> dict[str, Any]:
    """The record of a sealed folder, itself unharmed.

    Raises:
        CorruptCheckpointError: there is none, or it is not what was written.
    """
    try:
        text = (folder / COMPLETE).read_text(encoding="utf-8")
        record = json.loads(text)
        del record[_SELF]
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"it has no {COMPLETE}: it was cut off, or is not this version's") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptCheckpointError(f"its {COMPLETE} is damaged, or another version's") from error
    if text != _text(record):
        raise CorruptCheckpointError(f"its {COMPLETE} is damaged: it does not match its own checksum")
    return dict(record)


def belongs(folder: RunDir, step: int, run_id: str) -> dict[str, Any]:
    """The record of a checkpoint of this run.

    Raises:
        CorruptCheckpointError: it is of another run or step, or has no record.
    """
    record = read(folder.checkpoint(step))
    if record.get("run_id") != run_id:
        raise CorruptCheckpointError(f"it is of another run (id {record.get('run_id')}, this one's is {run_id})")
    if record.get("step") != step:
        raise CorruptCheckpointError(f"it was saved at step {record.get('step')}")
    return record


def of_this_run(folder: RunDir, run_id: str) -> list[int]:
    """Steps whose checkpoints this run has sealed, ascending; what else is there is nobody's here to remove."""
    steps = []
    for step in folder.numbered("checkpoint"):
        with contextlib.suppress(CorruptCheckpointError):
            belongs(folder, step, run_id)
            steps.append(step)
    return steps


def damage(folder: Path, record: dict[str, Any], of: Collection[str] | None = None) -> str | None:
    """What is wrong with these files (all, where none are named); None where each is as it was saved.

    Nothing is unpickled: bytes are counted and hashed.
    """
    files = record["files"]
    try:
        strangers = sorted(set(names(folder)) - set(files))
        if strangers:
            return f"{strangers[0]} was not saved with it"
        return next((said for name in files if of is None or name in of if (said := _harm(folder, name, files))), None)
    except OSError as error:
        return f"{Path(str(error.filename)).name} {CANNOT_BE_READ} ({error.strerror})"


def _harm(folder: Path, name: str, files: dict[str, Any]) -> str | None:
    path, saved = folder / name, files[name]
    if path.is_symlink() or not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != saved["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, {saved['bytes']} were saved"
    return None if sha256(path) == saved["sha256"] else f"{name} does not match its checksum"


def share(record: dict[str, Any], rank: int, ranks: int) -> list[str]:
    """The files that a rank looks through, so that all ranks together look through each once, by even bytes."""
    files: dict[str, dict[str, int]] = record["files"]
    load = [0] * ranks
    taken: list[list[str]] = [[] for _ in range(ranks)]
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = load.index(min(load))
        taken[least].append(name)
        load[least] += files[name]["bytes"]
    return taken[rank]


def publish(partial: Path, target: Path, removing: Path) -> None:
    """Gives a sealed folder its name; what this run had saved under it is removed, anything else is put aside."""
    replaced = None
    if target.exists() or target.is_symlink():
        before = run_of(target)
        if before is not None and before == run_of(partial):
            replaced = _out_of_sight(target, removing)
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


def quarantine(folder: Path) -> Path:
    """Takes a folder that cannot be trusted out of the way, under a name by which it is found again."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.corrupt-{number}")).exists():
        number += 1
    folder.replace(aside)
    return aside


def await_seen(path: Path, seconds: float = timeouts.CHECKPOINT_VISIBLE) -> bool:
    """Whether a folder that another node has given its name is seen here, in so many seconds at most."""
    until = time.monotonic() + seconds
    while path not in path.parent.iterdir():  # listing the parent has an NFS client look again
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def remove(folder: Path, removing: Path, say: Callable[[str], None]) -> None:
    """Removes a folder: out of sight first, so that one cut off half way is never taken for whole. One that cannot be
    removed stays, which is said."""
    try:
        shutil.rmtree(_out_of_sight(folder, removing))
    except OSError as error:
        say(f"{folder} could not be removed ({error.strerror})")


def _out_of_sight(folder: Path, removing: Path) -> Path:
    """Moves a folder to where it is removed, in place of what was left there."""
    removing.mkdir(exist_ok=True)
    away = removing / folder.name
    if away.exists():
        shutil.rmtree(away)
    folder.replace(away)
    return away


def copy_model(source: Path, partial: Path, copy: Callable[[Path, Path], Any] = shutil.copy2) -> None:
    """Copies a folder's model to another, without its manifest and the training state; `copy` copies one file."""
    for name in names(source):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in TRAINING_STATE):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            copy(source / name, partial / name)


def run_of(folder: Path) -> str | None:
    """The run that sealed a folder; None where nothing did."""
    try:
        return read(folder).get("run_id")
    except CorruptCheckpointError:
        return None


def _text(record: dict[str, Any]) -> str:
    """A record as it is written, letter by letter, with its own checksum."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, _SELF: digest}, indent=1) + "\n"
