"""Chooses what a start goes on from: the newest whole checkpoint of this run, looked through by all ranks together
before anything in it is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.planner.plan import Plan
from sft_recipes.runtime.errors import TrainingError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.training.checkpoint import checkpoint_format
from sft_recipes.training.checkpoint.checkpoint_format import CorruptCheckpointError


class NoValidCheckpointError(TrainingError):
    """The run has saved, and nothing that it saved is whole; never a start from step 0 unasked."""


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint and its record."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return int(self.record["step"])


def newest(plan: Plan, folder: RunDir, accelerator: Any, say: Callable[[str], None]) -> ResumePoint | None:
    """The newest whole checkpoint of this run; None where it has not saved yet. All ranks take part and choose alike.

    What is passed over is said, and never deleted: this run's own is put aside, all else stays where it is.

    Raises:
        NoValidCheckpointError: there are checkpoints, or were, and none is whole.
    """
    from accelerate.utils import broadcast_object_list

    listed: list[Any] = [list(reversed(folder.numbered("checkpoint")))]
    broadcast_object_list(listed)
    passed_over: list[str] = []
    for step in listed[0]:
        found = look_through(folder, step, plan.run_id, accelerator)
        if isinstance(found, ResumePoint):
            return found
        name = folder.checkpoint(step).name
        passed_over.append(f"{name}: {found}")
        damaged = accelerator.is_main_process and checkpoint_format.CANNOT_BE_READ not in found
        aside = _out_of_the_way(folder, step, plan.run_id, say) if damaged else None
        say(f"passing over {passed_over[-1]}{f'; it is kept as {aside.name}' if aside else ''}")
    lost: list[Any] = [_what_there_was(folder) if accelerator.is_main_process else None]
    broadcast_object_list(lost)
    if passed_over or lost[0]:
        what = "; ".join(passed_over) or lost[0]
        raise NoValidCheckpointError(
            f"{folder.path}: no checkpoint of this run is whole ({what}); nothing was started from step 0: bring one "
            f"back, or begin a run of its own: NAME=…"
        )
    return None


def _what_there_was(folder: RunDir) -> str | None:
    """Why a run without a checkpoint has had one; None where nothing says so."""
    saved = read_json(folder.manifest).get("saved_step")
    aside = sorted(path.name for path in folder.path.glob("checkpoint-*.corrupt-*"))
    if saved:
        return f"it has saved step {saved}, and no checkpoint is there"
    return f"{aside[-1]} is all there is" if aside else None


def clear(folder: RunDir, say: Callable[[str], None]) -> None:
    """Takes away what an earlier start was writing, or removing, when it ended; for rank 0, before it saves."""
    for path in sorted(folder.saving.glob("*")):
        say(f"{path.name} was cut off while it was written: a kill, or less time to stop than a save takes")
    for place in (folder.saving, folder.removing):
        try:
            if place.exists():
                shutil.rmtree(place)
        except OSError as error:
            say(f"{place} could not be removed ({error.strerror})")


def look_through(folder: RunDir, step: int, run_id: str, accelerator: Any) -> ResumePoint | str:
    """A checkpoint of a run, looked through by all ranks; else why it is not one to go on from."""
    from accelerate.utils import broadcast_object_list

    read: list[Any] = [_record(folder, step, run_id) if accelerator.is_main_process else None]
    broadcast_object_list(read)  # so that all ranks go the same way, whatever each of them sees
    record: dict[str, Any] | str = read[0]
    if isinstance(record, str):
        return record
    damage = _damage_on_any_rank(folder.checkpoint(step), record, accelerator)
    return damage or ResumePoint(folder.checkpoint(step), record)


def _record(folder: RunDir, step: int, run_id: str) -> dict[str, Any] | str:
    """A checkpoint's record, or why it is not one to go on from."""
    try:
        return checkpoint_format.belongs(folder, step, run_id)
    except CorruptCheckpointError as error:
        return str(error)


def _damage_on_any_rank(path: Path, record: dict[str, Any], accelerator: Any) -> str | None:
    """Each rank looks through its share of the files."""
    from accelerate.utils import gather_object

    if checkpoint_format.await_seen(path):
        share = checkpoint_format.share(record, accelerator.process_index, accelerator.num_processes)
        mine = checkpoint_format.damage(path, record, share)
    else:
        mine = f"by rank {accelerator.process_index} it {checkpoint_format.CANNOT_BE_READ}: it is not seen"
    return next((one for one in gather_object([mine]) if one), None)


def _out_of_the_way(folder: RunDir, step: int, run_id: str, say: Callable[[str], None]) -> Path | None:
    """Renames a damaged checkpoint of this run, which would else count as one of the two that are kept."""
    if isinstance(_record(folder, step, run_id), str):
        return None
    try:
        return checkpoint_format.quarantine(folder.checkpoint(step))
    except OSError as error:
        say(f"{folder.checkpoint(step)} could not be renamed ({error.strerror})")
        return None
